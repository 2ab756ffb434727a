"""Products of the CPU's kernels against the weights that their tiles stand for."""

import pytest
import torch

from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.quantization import weight_format
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.cpu import tiles
from mgpu.worker.kernels.cpu.tiles import TiledWeight, has_kernels, multiply, tiled
from mgpu.worker.quantization.packing import PackedWeight, dequantize, pack_int4
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.random_packed import random_packed

BF16 = torch.bfloat16
FORMS = {
    **{name: GGUF_FORMATS[name] for name in ("Q4_0", "Q4_1", "Q4_K", "Q8_0", "MXFP4", "IQ4_NL", "IQ4_XS")},
    "e2m1": WeightFormat("fp4", 32, scale_bytes=1, source="MXFP4"),
    "zeros": WeightFormat("4", 128, scale_bytes=2, zero_bytes=2, source="GPTQ"),
    "8 bits, zeros": WeightFormat("8", 128, scale_bytes=2, zero_bytes=2, source="GPTQ"),
}
pytestmark = pytest.mark.skipif(not has_kernels(), reason="needs a C compiler")


def drawn(form: WeightFormat, outputs: int = 48, inputs: int = 512) -> PackedWeight:
    return random_packed(form, (outputs,), inputs, torch.Generator().manual_seed(1))


def quantized(quant: str) -> PackedWeight:
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(2))
    return quantize(weight, weight_format("4" if quant == "4" else "8"))


def held(weight: PackedWeight) -> TiledWeight:
    found = tiled(weight)
    assert found is not None
    return found


def inputs_of(rows: int, weight: PackedWeight) -> torch.Tensor:
    return torch.randn(rows, weight.k, generator=torch.Generator().manual_seed(3)).to(BF16)


def error(weight: PackedWeight, rows: int) -> float:
    """Return the error of a product as a share of the size of the numbers that were added up."""
    x, dense = inputs_of(rows, weight), dequantize(weight, torch.float32)
    size = (x.float().square() @ dense.square().T).sqrt()
    return float((multiply(x, held(weight)).float() - x.float() @ dense.T).square().mean().sqrt() / size.mean())


@pytest.mark.parametrize("rows", [1, 3, 8, 21])
@pytest.mark.parametrize("name", FORMS)
def test_products_of_files_differ_by_the_rounding_of_inputs(name: str, rows: int) -> None:
    assert error(drawn(FORMS[name]), rows) < 0.01


@pytest.mark.parametrize("quant", ["4", "8"])
def test_products_of_weights_that_were_quantized_while_loading(quant: str) -> None:
    assert error(quantized(quant), 5) < 0.01


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_a_last_tile_that_is_not_full(name: str) -> None:
    weight = drawn(FORMS[name], outputs=37)
    assert multiply(inputs_of(2, weight), held(weight)).shape == (2, 37)
    assert error(weight, 2) < 0.01


def test_inputs_that_are_integers_up_to_127_are_multiplied_exactly() -> None:
    weight = drawn(FORMS["Q8_0"], inputs=64)
    x = torch.randint(-126, 127, (4, 64), generator=torch.Generator().manual_seed(4))
    x[:, ::32] = 127  # so that an input's step is 1
    exact = x.double() @ dequantize(weight, torch.float32).double().T
    torch.testing.assert_close(multiply(x.to(BF16), held(weight)).double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_single_rows_are_the_weights_of_the_file(name: str) -> None:
    weight, rows = drawn(FORMS[name]), torch.tensor([47, 0, 16, 0])
    found, expected = held(weight).rows(rows, torch.float32), dequantize(weight, torch.float32)[rows]
    # Scales that are products of two numbers of the file are rounded to float16.
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if name in ("Q4_0", "Q4_1", "Q8_0", "e2m1") else 2e-3)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_tiles_take_no_more_than_the_packed_words(name: str) -> None:
    weight = drawn(FORMS[name])
    assert held(weight).nbytes == weight.nbytes


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_stay_so(bad: float) -> None:
    weight = drawn(FORMS["Q4_1"])
    x = inputs_of(3, weight)
    x[1, 100] = bad
    found = multiply(x, held(weight))
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_zeros_give_zeros() -> None:
    weight = drawn(FORMS["Q8_0"])
    assert not multiply(torch.zeros(2, weight.k, dtype=BF16), held(weight)).any()


def test_a_row_is_the_same_alone_and_beside_others() -> None:
    weight = drawn(FORMS["Q4_1"])
    x = inputs_of(21, weight)
    assert torch.equal(multiply(x, held(weight))[13:14], multiply(x[13:14], held(weight)))


def test_rows_with_gaps_between_them() -> None:
    weight = drawn(FORMS["Q4_1"])
    x = inputs_of(6, weight)
    assert torch.equal(multiply(x[::2], held(weight)), multiply(x[::2].contiguous(), held(weight)))


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_scales_outside_of_float16_are_not_rounded(size: float) -> None:
    q = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(5))
    scales = torch.full((16, 2), size)
    assert tiled(pack_int4(q, scales, torch.zeros(16, 2), 32)) is None


@pytest.mark.parametrize(
    "weight",
    [drawn(GGUF_FORMATS["Q5_0"]), drawn(GGUF_FORMATS["Q6_K"])],
    ids=["5 bits", "6 bits"],
)
def test_other_weights_are_not_held_in_tiles(weight: PackedWeight) -> None:
    assert tiled(weight) is None


def test_the_scale_of_a_block_of_zeros_does_not_matter() -> None:
    weight = drawn(FORMS["e2m1"], inputs=64)
    weight.words[0] = 0
    weight.scales[0] = 0  # 2^-127, which float16 does not hold
    assert not multiply(inputs_of(2, weight), held(weight))[:, 0].any()
    assert error(weight, 2) < 0.01
    weight.words[0, 0] = 1
    assert tiled(weight) is None


def test_a_weight_is_repacked_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(FORMS["Q4_K"], outputs=85)
    whole = held(weight)
    monkeypatch.setattr(tiles, "_AT_ONCE", 20 * weight.k)
    assert torch.equal(held(weight).tiles, whole.tiles)
