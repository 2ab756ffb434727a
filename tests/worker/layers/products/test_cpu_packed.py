"""Weights repacked for torch's kernels on the CPU, against the weights that they stand for."""

import pytest
import torch
from torch import Tensor

from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.quantization import weight_format
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.cpu.tiles import TiledWeight, has_kernels
from mgpu.worker.layers.products import cpu_packed
from mgpu.worker.layers.products.cpu_packed import TorchWeight, has_kernel, multiply, repack
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.random_packed import random_packed

BF16 = torch.bfloat16
PLAIN_ZEROS = WeightFormat("4", 128, scale_bytes=2, zero_bytes=2, source="GPTQ")
NEEDS_INT4 = pytest.mark.skipif(not has_kernel("int4"), reason="needs torch's 4-bit product for the CPU")
NEEDS_INT8 = pytest.mark.skipif(not has_kernel("int8"), reason="needs torch's 8-bit product for the CPU")


@pytest.fixture(autouse=True)
def without_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_packed.tiles, "tiled", lambda weight: None)


def drawn(form: WeightFormat, outputs: int = 48, inputs: int = 512) -> PackedWeight:
    return random_packed(form, (outputs,), inputs, torch.Generator().manual_seed(1))


def quantized(quant: str, outputs: int = 48, inputs: int = 192) -> PackedWeight:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(2))
    return quantize(weight, weight_format("4" if quant == "4" else "8"))


def error(weight: PackedWeight, rows: int, bias: Tensor | None = None) -> float:
    """Return the largest error of a product of the repacked weight, as a share of the largest result."""
    held = repack(weight, BF16)
    assert isinstance(held, TorchWeight)
    x = torch.randn(rows, weight.k, generator=torch.Generator().manual_seed(3)).to(BF16)
    expected = torch.nn.functional.linear(x.float(), dequantize(weight, torch.float32), bias)
    found = multiply(x, held, None if bias is None else bias.to(BF16)).float()
    return float((found - expected).abs().max() / expected.abs().max())


@NEEDS_INT4
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(
    "form",
    [GGUF_FORMATS["Q4_0"], GGUF_FORMATS["Q4_1"], GGUF_FORMATS["Q4_K"], PLAIN_ZEROS],
    ids=["Q4_0", "Q4_1", "Q4_K", "zeros"],
)
def test_products_with_4_bits_are_those_of_the_file(form: WeightFormat, rows: int) -> None:
    assert error(drawn(form), rows) < 0.01


@NEEDS_INT4
def test_int4_made_while_loading_is_repacked_without_rounding() -> None:
    weight = quantized("4")
    held = repack(weight, BF16)
    assert isinstance(held, TorchWeight)
    # A row of the unit matrix picks one weight of each output, so that nothing is added up.
    found = multiply(torch.eye(weight.k, dtype=BF16), held).T
    assert torch.equal(found, dequantize(weight, torch.float32).to(BF16))


@NEEDS_INT8
@pytest.mark.parametrize("rows", [1, 5])
def test_products_with_int8(rows: int) -> None:
    assert error(quantized("8"), rows, torch.ones(48)) < 0.01


@NEEDS_INT4
def test_a_repacked_weight_takes_as_few_bytes() -> None:
    weight = drawn(GGUF_FORMATS["Q4_1"])
    assert repack(weight, BF16).nbytes == weight.nbytes


@pytest.mark.parametrize(
    "weight",
    [
        drawn(GGUF_FORMATS["Q5_0"]),
        drawn(GGUF_FORMATS["Q8_0"]),
        drawn(GGUF_FORMATS["IQ4_NL"]),
        quantized("4", outputs=40),
    ],
    ids=["5 bits", "8 bits in groups", "values of a table", "40 outputs"],
)
def test_other_weights_stay_as_they_are(weight: PackedWeight) -> None:
    assert repack(weight, BF16) is weight


@pytest.mark.skipif(not has_kernels(), reason="needs a C compiler")
@pytest.mark.parametrize("quant", ["4", "8"])
def test_own_kernels_come_first(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert isinstance(repack(quantized(quant), BF16), TiledWeight)


def test_float32_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight = quantized("4")
    assert repack(weight, torch.float32) is weight
