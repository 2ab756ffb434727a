"""Packed experts of a few tokens equal plain torch for widths that fill no whole step of a program."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernels.kernel_checks import relative_error
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.expert_facts import Clamp
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.experts.few_packed import FewPackedTiling, few_packed
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.random_packed import random_packed
from mgpu.worker.quantization.stacks import empty_stack, matrix_of, put_matrix

MXFP4 = WeightFormat("fp4", 32, 1, 1, source="x")
FP8_BLOCKS = WeightFormat("fp8", 128, 16, 2, source="x")
INT4_ZEROS = WeightFormat("4", 32, 1, 2, 1, source="x")
INT8_GROUPS = WeightFormat("8", 32, 1, 2, source="x")
CLAMP = Clamp(alpha=1.702, limit=1.0)


def random_stack(form: WeightFormat, count: int, outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    generator = torch.Generator(device).manual_seed(0)
    matrices = [random_packed(form, (outputs,), inputs, generator) for _ in range(count)]
    stack = empty_stack(matrices[0], count)
    for index, matrix in enumerate(matrices):
        put_matrix(stack, index, matrix)
    return stack


def clamped(both: Tensor) -> Tensor:
    gate, up = both.chunk(2)
    gate, up = gate.clamp(max=CLAMP.limit), up.clamp(-CLAMP.limit, CLAMP.limit)
    return (up + 1) * gate * torch.sigmoid(CLAMP.alpha * gate)


def silu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    ("form", "width", "inputs", "tiling"),
    [(MXFP4, 5, 2880, None), (MXFP4, 6, 736, FewPackedTiling(4, 64, 1)), (FP8_BLOCKS, 8, 768, None),
     (FP8_BLOCKS, 8, 1408, FewPackedTiling(8, 256, 2)), (GGUF_FORMATS["Q6_K"], 5, 1280, None),
     (GGUF_FORMATS["Q4_K"], 5, 768, FewPackedTiling(8, 32, 1)), (GGUF_FORMATS["Q8_0"], 5, 160, None),
     (GGUF_FORMATS["Q5_1"], 5, 160, None), (GGUF_FORMATS["IQ4_NL"], 5, 160, None), (INT4_ZEROS, 5, 160, None),
     (INT8_GROUPS, 5, 160, None)],
)  # fmt: skip
def test_both_products_of_some_experts(
    device: torch.device, form: WeightFormat, width: int, inputs: int, tiling: FewPackedTiling | None
) -> None:
    """The rank has two of four experts. Gate and up are biased and, for gpt-oss, limited; down is weighted."""
    x, rows = torch.randn(2, inputs, device=device), torch.randn(4, inputs, device=device)
    experts = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=device)
    weights = torch.rand(2, 2, device=device)
    stack, bias = random_stack(form, 2, 2 * width, inputs, device), torch.randn(2, 2 * width, device=device)
    activate, clamp = (clamped, CLAMP) if form is MXFP4 else (silu, None)
    gated = few_packed(x, stack, (experts, weights), 1, 1, bias_NO=bias, clamp=clamp, tiling=tiling)
    plain = few_packed(rows, stack, (experts, weights), 1, 0, bias_NO=bias, tiling=tiling)
    for pair, expert in enumerate(experts.flatten().tolist()):
        if not 1 <= expert <= 2:
            continue
        dense = dequantize(matrix_of(stack, expert - 1), torch.float32)
        expected = activate(dense @ x[pair // 2] + bias[expert - 1])
        assert relative_error(gated[pair], expected) < 3e-5
        expected = weights.flatten()[pair] * (dense @ rows[pair] + bias[expert - 1])
        assert relative_error(plain[pair], expected) < 3e-5
