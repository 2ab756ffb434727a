"""Quantized weights: their error, their products, their slices and the memory that making them takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.quantization import WeightFormat, weight_format
from mgpu.worker.layers.products.choose import packed_product
from mgpu.worker.quantization.packing import dequantize
from mgpu.worker.quantization.quantize import quantize, search_int4

INT8, FP8, INT4 = (weight_format(quant) for quant in ("8", "fp8", "4"))
ALL = pytest.mark.parametrize("form", [INT8, FP8, INT4, WeightFormat("4", 64)], ids=str)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(weight: Tensor, form: WeightFormat) -> Tensor:
    return dequantize(quantize(weight, form), torch.float32)


@pytest.mark.parametrize(
    ("form", "error"), [(INT8, 0.008), (FP8, 0.028), (INT4, 0.072), (WeightFormat("4", 64), 0.084)]
)
def test_the_error_of_a_normal_weight_is_bounded(form: WeightFormat, error: float) -> None:
    weight = draw(300, 576)
    assert (restored(weight, form) - weight).norm() < error * weight.norm()


def test_no_int8_value_is_off_by_more_than_half_a_step() -> None:
    weight = draw(70, 200)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored(weight, INT8) - weight).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_no_int4_group_is_worse_than_rounding_to_nearest(group: int) -> None:
    # Heavy tails, where clipping pays most.
    weight = draw(64, 8 * group) * draw(64, 8 * group, seed=1).exp()
    w_NGE = weight.view(64, 8, group)
    low, high = w_NGE.amin(2, keepdim=True), w_NGE.amax(2, keepdim=True)
    steps = (high - low) / 15
    nearest = (((w_NGE - low) / steps).round() * steps + low - w_NGE).square().sum(2)
    q, scales, offsets = search_int4(weight, group)
    searched = (q.view(64, 8, group) * scales[:, :, None] + offsets[:, :, None] - w_NGE).square().sum(2)
    assert (searched <= nearest * 1.01).all()  # the scale that is stored has eight bits
    assert searched.sum() < 0.85 * nearest.sum()


def test_int4_finds_values_that_lie_on_a_grid_of_sixteen() -> None:
    steps, lows = draw(20, 9, 1, seed=1).exp() / 50, -7.5 + draw(20, 9, 1, seed=2)
    levels = torch.randint(16, (20, 9, 32), generator=torch.Generator().manual_seed(3))
    levels[:, :, :2] = torch.tensor([0, 15])
    weight_NGE = (levels + lows) * steps
    errors_NGE = restored(weight_NGE.flatten(1), INT4).view(weight_NGE.shape) - weight_NGE
    assert (errors_NGE.abs() <= 0.04 * steps).all()  # eight bits of scale and offset


@pytest.mark.parametrize("value", [1.0, 0.1, -3.3, 1e-20, 65504.0, -1e20])
@pytest.mark.parametrize("inputs", [64, 70])
def test_int4_holds_groups_of_one_value(value: float, inputs: int) -> None:
    weight = torch.full((2, inputs), value)
    torch.testing.assert_close(restored(weight, INT4), weight, rtol=1e-5, atol=0.0)


def test_int4_resolves_small_differences_between_large_weights() -> None:
    differences = draw(30, 320) / 1000
    assert (restored(1 + differences, INT4) - 1 - differences).norm() < 0.12 * differences.norm()


def test_inputs_past_the_last_whole_int4_group_are_as_good_as_the_others() -> None:
    weight = 3 + draw(300, 65)
    errors = (restored(weight, INT4) - weight).norm(dim=0)
    assert errors[64] < errors[:64].mean()  # it has a group of its own


@pytest.mark.parametrize("form", [INT8, INT4, WeightFormat("4", 64)], ids=str)
def test_zeros_large_and_small_channels_stay_finite(form: WeightFormat) -> None:
    weight = draw(7, 128)
    weight[1] = 0
    weight[2] *= 1e30
    weight[3] *= 1e-30
    weight[4, :64] = 0
    weight[5] *= 1e-39  # subnormal
    values = restored(weight, form)
    assert torch.isfinite(values).all()
    assert (values[1] == 0).all()
    assert ((values - weight).norm(dim=1) <= 0.12 * weight.norm(dim=1)).all()


@pytest.mark.parametrize("size", [1e-39, 1e-30, 1.0, 1e30])
def test_fp8_holds_channels_a_thousand_times_smaller_than_others(size: float) -> None:
    weight = draw(4, 128)
    weight[1] /= 1000
    weight[2] = 0
    values = restored(weight * size, FP8)
    assert torch.isfinite(values).all()
    assert ((values - weight * size).norm(dim=1) <= (0.05 if size > 1e-35 else 1.0) * (weight * size).norm(dim=1)).all()
    assert (restored(torch.zeros(2, 128), FP8) == 0).all()


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 70])
def test_the_product_is_that_of_the_dequantized_weight(form: WeightFormat, dtype: torch.dtype, rows: int) -> None:
    packed = quantize(draw(700, 480), form)  # several blocks, a last one that is not full, padded words
    x, bias = draw(rows, 480, seed=1).to(dtype), draw(700, seed=2).to(dtype)
    expected = F.linear(x, dequantize(packed, dtype), bias)
    multiply = packed_product(torch.device("cpu"), form)
    torch.testing.assert_close(multiply(x, packed, bias), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(multiply(x, packed, None), F.linear(x, dequantize(packed, dtype)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", [INT8, INT4, WeightFormat("4", 64)], ids=str)
def test_rows_quantize_alone_as_within_the_whole(form: WeightFormat) -> None:
    """So column-parallel ranks hold the very values of one worker."""
    weight = draw(200, 576)
    assert torch.equal(torch.cat([restored(weight[:70], form), restored(weight[70:], form)]), restored(weight, form))


def test_fp8_slices_have_the_values_of_the_whole_but_for_the_smallest() -> None:
    weight = draw(200, 576)
    weight[:100] /= 50
    whole, parts = quantize(weight, FP8), [quantize(half, FP8) for half in weight.chunk(2)]
    assert parts[0].scales[0, 0] < parts[1].scales[0, 0] == whole.scales[0, 0]
    alone, within = torch.cat([dequantize(part, torch.float32) for part in parts]), dequantize(whole, torch.float32)
    is_normal = weight.abs() > whole.scales[0, 0] * 2**-6
    assert torch.equal(alone[is_normal], within[is_normal])
    assert ((alone - weight).abs() <= (within - weight).abs()).all()


def test_columns_of_whole_int4_groups_quantize_alone_as_within_the_whole() -> None:
    """So row-parallel ranks do too."""
    weight = draw(50, 512)
    parts = [restored(weight[:, first : first + 128], INT4) for first in range(0, 512, 128)]
    assert torch.equal(torch.cat(parts, 1), restored(weight, INT4))


@pytest.mark.parametrize("form", [INT8, FP8], ids=str)
def test_columns_with_scales_of_their_own_are_no_worse_than_the_whole(form: WeightFormat) -> None:
    weight = draw(50, 512)
    parts = torch.cat([restored(weight[:, first : first + 128], form) for first in range(0, 512, 128)], 1)
    assert (parts - weight).norm() <= (restored(weight, form) - weight).norm()
