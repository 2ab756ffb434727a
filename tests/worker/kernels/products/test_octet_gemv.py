"""Products of one row and 8-bit words whose groups have scales equal plain torch."""

import pytest
import torch

from harness.kernels.kernel_checks import relative_error
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.products import choose
from mgpu.worker.kernels.products.octet_gemv import OctetGemvTiling, octet_gemv, takes_octets
from mgpu.worker.quantization.packing import PackedWeight, dequantize, octet_words
from mgpu.worker.quantization.random_packed import random_packed

TILINGS = [None, OctetGemvTiling(4, 32, 1), OctetGemvTiling(2, 64, 2, ahead=True)]


def blocks(outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(outputs, inputs, generator=generator, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(outputs // 128, -(-inputs // 128), generator=generator, device=device) + 0.5
    return PackedWeight("fp8", octet_words(values.view(torch.uint8)), scales, inputs, 128, 128)


def runs(outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    generator = torch.Generator(device).manual_seed(0)
    return random_packed(GGUF_FORMATS["Q8_0"], (outputs,), inputs, generator)


@pytest.mark.parametrize("make", [blocks, runs])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("inputs", [128, 640])
def test_products_equal_those_of_the_dequantized_weight(
    make: object, tiling: OctetGemvTiling | None, inputs: int, device: torch.device
) -> None:
    weight = blocks(256, inputs, device) if make is blocks else runs(256, inputs, device)
    x, bias = torch.randn(1, inputs, device=device).bfloat16(), torch.randn(256, device=device)
    sums = x.float() @ dequantize(weight, torch.float32).T + bias
    assert takes_octets(weight)
    assert relative_error(octet_gemv(x, weight, bias_N=bias, tiling=tiling), sums) < 4e-3
    gated = torch.nn.functional.silu(sums[:, :128]) * sums[:, 128:]
    assert relative_error(octet_gemv(x, weight, gate="silu", bias_N=bias, tiling=tiling), gated) < 4e-3


def test_inputs_that_do_not_fill_the_words_count_as_zeros(device: torch.device) -> None:
    weight = blocks(256, 200, device)
    x = torch.randn(1, 200, device=device)
    expected = x @ dequantize(weight, torch.float32).T
    assert relative_error(octet_gemv(x, weight, tiling=OctetGemvTiling(2, 32, 1)), expected) < 1e-5


@pytest.mark.parametrize(
    ("form", "outputs", "inputs", "taken"),
    [
        (GGUF_FORMATS["Q8_0"], 24, 256, True),
        (GGUF_FORMATS["Q8_0"], 24, 96, False),
        (WeightFormat("8", 128, 1, 2, 1, source="groups"), 24, 256, False),
        (GGUF_FORMATS["Q4_0"], 24, 256, False),
    ],
)
def test_whole_words_of_groups_of_32_are_taken(form: WeightFormat, outputs: int, inputs: int, taken: bool) -> None:
    assert takes_octets(random_packed(form, (outputs,), inputs, torch.Generator().manual_seed(0))) is taken


def test_blocks_that_gate_and_up_share_are_not_taken() -> None:
    assert takes_octets(blocks(256, 128, torch.device("cpu")))
    assert not takes_octets(blocks(384, 128, torch.device("cpu")))


@pytest.mark.parametrize("make", [blocks, runs])
def test_one_row_is_multiplied_by_it(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = blocks(256, 128, torch.device("cpu")) if make is blocks else runs(256, 128, torch.device("cpu"))
    monkeypatch.setattr(choose, "octet_gemv", lambda *_, **__: "here")
    assert choose.takes_one_row(weight)
    assert choose.quantized_matmul(torch.zeros(1, 128, dtype=torch.bfloat16), weight) == "here"
