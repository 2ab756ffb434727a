"""Kernels for weights of quantized checkpoints equal plain torch."""

from dataclasses import replace

import pytest
import torch

from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.random_packed import random_packed

pytest.importorskip("triton")

from mgpu.worker.kernels.products.choose import quantized_matmul
from mgpu.worker.kernels.products.dequantize import dequantize_packed
from mgpu.worker.kernels.products.group_gemm import choose_tiling, group_gemm
from mgpu.worker.kernels.runtime import Workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {
    "fp8-blocks": WeightFormat("fp8", 128, 16, 2, source="x"),
    "fp8-channel": WeightFormat("fp8", source="x"),
    "int8-zeros": WeightFormat("8", 0, 1, 2, 2, source="x"),
    "int8-groups": WeightFormat("8", 32, 1, 2, 2, source="x"),
    "int4-channel": WeightFormat("4", 0, 1, 2, source="x"),
    "int4-groups": WeightFormat("4", 32, 1, 2, 1, source="x"),
    "int4-wide": WeightFormat("4", 128, 1, 4, source="x"),
    "int4-order": WeightFormat("4", 32, 1, 2, 1, True, source="x"),
    "mxfp4": WeightFormat("fp4", 32, 1, 1, source="x"),
}


def make(form: WeightFormat, parts: tuple[int, ...], inputs: int) -> PackedWeight:
    """Return a random weight whose scales and zero points differ from group to group."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = random_packed(form, parts, inputs, generator)
    if form.block:
        return weight
    noise = torch.randint(0, 8, weight.scales.shape, generator=generator, device=DEVICE)
    if weight.scales.dtype == torch.uint8:
        scales = weight.scales + noise.to(torch.uint8)
    else:
        scales = (weight.scales.float() * (1 + noise / 8)).to(weight.scales.dtype)
    zeros = weight.zeros
    if zeros is not None:
        zeros = torch.randint(-8, 9, zeros.shape, generator=generator, device=DEVICE).to(zeros.dtype)
    return replace(weight, scales=scales, zeros=zeros)


@pytest.mark.parametrize("name", FORMS)
def test_dequantized_weights_equal_the_reference(name: str) -> None:
    for parts, inputs in (((48, 16), 256), ((33,), 416)):
        weight = make(FORMS[name], parts, inputs)
        found, expected = (unpack(weight, torch.float32) for unpack in (dequantize_packed, dequantize))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


EVERY = {name: form for name, form in FORMS.items() if not form.is_ordered} | GGUF_FORMATS


@pytest.mark.parametrize("name", EVERY)
def test_products_equal_those_of_the_dequantized_weight(name: str) -> None:
    form = EVERY[name]
    inputs = 512 if form.block > 32 or form.group > 32 else 480  # not whole steps of words, if that may be
    weight = make(form, (32,), inputs)
    dense = dequantize(weight, torch.float32)
    torch.testing.assert_close(dequantize_packed(weight, torch.float32), dense, rtol=1e-4, atol=1e-6)
    for rows in (1, 5):
        x = torch.randn(rows, inputs, device=DEVICE)
        expected = x @ dense.T + 1
        found = quantized_matmul(x, weight, torch.ones(32, device=DEVICE))
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_outputs_of_a_large_vocabulary_need_no_more_scratch_than_there_is() -> None:
    weight = make(GGUF_FORMATS["Q6_K"], (64,), 512)
    x, scratch = torch.randn(5, 512, device=DEVICE), Workspace.create(torch.device(DEVICE), 2 * 64 * 16, 1)
    assert choose_tiling(weight, 5).splits > 2, "of the tile that needs it all"
    expected = x @ dequantize(weight, torch.float32).T
    found = group_gemm(x, weight, workspace=scratch)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
