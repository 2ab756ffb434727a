"""Products of int8 weights in integers: rows become two bytes a channel, and what is multiplied is exact."""

import itertools

import pytest
import torch
from torch import Tensor

from harness.kernels.hopper import check_trial, hopper
from harness.kernels.kernel_checks import relative_error
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.layers.integer_rows import integer_rows
from mgpu.worker.kernels.products import choose
from mgpu.worker.kernels.products.warpgroup import integer_gemm, integer_trial
from mgpu.worker.quantization import integer_rows as reference
from mgpu.worker.quantization.integer_rows import IntegerRows
from mgpu.worker.quantization.packing import PackedWeight, dequantize, pack_int8
from mgpu.worker.quantization.random_packed import random_packed

STEP = 1 / reference.LARGEST
"""Neighbouring integers differ by so much of a row's largest value."""


def weight_of(outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    q = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, device=device)
    return pack_int8(q, torch.rand(outputs, device=device) + 0.5)


def rows_of(count: int, inputs: int, device: torch.device) -> Tensor:
    return (torch.randn(count, inputs, device=device) * torch.logspace(-3, 3, count, device=device)[:, None]).bfloat16()


def plain_product(rows: IntegerRows, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Multiply the bytes as they lie, as the kernel does."""
    sums = rows.octets.double() @ weight.words.view(torch.int8).double().T
    product = (256 * sums[::2] + sums[1::2]).float() * rows.scale_T[:, None] * weight.scales.T
    return (product if bias is None else product + bias).bfloat16()


@pytest.mark.parametrize("k", [96, 128, 1100])
def test_rows_become_integers_as_in_the_reference(device: torch.device, k: int) -> None:
    x = rows_of(5, k, device)
    x[3] = 0
    got, expected = integer_rows(x), reference.integer_rows(x)
    assert torch.equal(got.scale_T, expected.scale_T)
    assert torch.equal(got.octets, expected.octets)
    assert (reference.round_integers(x) - x.float()).abs().amax(1).le(0.51 * STEP * x.float().abs().amax(1)).all()
    alone = integer_rows(x[1:2])
    assert torch.equal(alone.octets, got.octets[2:4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_makes_its_row_none(device: torch.device, bad: float) -> None:
    x = torch.ones(2, 256, device=device).bfloat16()
    x[1, 7] = bad
    scales = integer_rows(x).scale_T.isfinite().tolist()
    assert scales == reference.integer_rows(x).scale_T.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 320), (8, 512)])
def test_bytes_as_they_lie_are_the_product(device: torch.device, outputs: int, inputs: int) -> None:
    weight, x = weight_of(outputs, inputs, device), rows_of(7, inputs, device)
    got = plain_product(integer_rows(x), weight)
    assert relative_error(got, reference.round_integers(x) @ dequantize(weight, torch.float32).T) < 3e-3
    assert relative_error(reference.round_integers(x), x) < 2e-4


@pytest.mark.gpu
def test_products_equal_those_of_the_dequantized_weight() -> None:
    device = hopper()
    sizes, counts = ((200, 512), (1024, 4096), (320, 1300)), (1, 64, 128, 200, 300, 600)
    for (outputs, inputs), count in itertools.product(sizes, counts):
        weight, x = weight_of(outputs, inputs, device), torch.randn(count, inputs, device=device).bfloat16()
        bias = torch.randn(outputs, device=device).bfloat16()
        expected = x.float() @ dequantize(weight, torch.float32).T
        assert relative_error(integer_gemm.integer_gemm(integer_rows(x), weight), expected) < 3e-3
        assert relative_error(integer_gemm.integer_gemm(integer_rows(x), weight, bias_N=bias), expected + bias) < 3e-3


def test_few_tiles_are_cut_until_they_fill_a_gpu() -> None:
    shapes = {"gate_up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "o": (4096, 4096)}
    found = {
        name: [integer_gemm.choose_splits(rows, *shape) for rows in (128, 256, 512)] for name, shape in shapes.items()
    }
    assert found == {"gate_up": [1, 1, 1], "down": [4, 2, 1], "qkv": [2, 1, 1], "o": [4, 2, 1]}  # as measured
    assert integer_gemm.choose_splits(513, 128, 8192) == 1  # no further kernel for prompts


def test_many_rows_are_multiplied_in_integers_where_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        counts.append(len(x))
        return plain_product(reference.integer_rows(x), weight, bias)

    weight, least = weight_of(16, 256, torch.device("cpu")), integer_trial.LEAST_ROWS
    for count, found in ((least, product), (least - 1, product), (least, None)):
        monkeypatch.setattr(integer_trial, "integer_product", lambda device, found=found: found)
        x = torch.randn(count, 256).bfloat16()
        got = choose.quantized_matmul(x, weight)
        assert relative_error(got, x.float() @ dequantize(weight, torch.float32).T) < 5e-3
    assert counts == [least]


@pytest.mark.parametrize(
    ("form", "dtype", "taken"),
    [
        (WeightFormat("8"), torch.bfloat16, True),
        (WeightFormat("8"), torch.float16, False),
        (WeightFormat("8", source="x"), torch.bfloat16, True),
        (WeightFormat("8", 128, source="x"), torch.bfloat16, False),
        (WeightFormat("8", 0, 1, 4, 1, source="x"), torch.bfloat16, False),
        (WeightFormat("fp8"), torch.bfloat16, False),
    ],
)
def test_a_scale_per_output_is_taken(form: WeightFormat, dtype: torch.dtype, taken: bool) -> None:
    weight = random_packed(form, (64,), 512, torch.Generator().manual_seed(0))
    assert integer_trial.takes_octets(weight, dtype) is taken


def test_a_device_that_fails_the_trial_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trial(monkeypatch, integer_trial, "integer_product", (8, 9))
