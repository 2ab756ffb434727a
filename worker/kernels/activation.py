# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Gated activation: act(gate) * up from the stacked product of both, optionally quantized to float8."""

# T tokens, F feed-forward dim of this rank

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

BLOCK = 2048


@triton.jit
def _gated(gate, up, IS_SILU: tl.constexpr, DTYPE: tl.constexpr):
    gate = gate.to(tl.float32)
    if IS_SILU:
        active = gate / (1.0 + tl.exp(-gate))
    else:
        # tanh(z) = 2 * sigmoid(2z) - 1, so gelu_tanh(x) = x * sigmoid(2z)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-2.0 * z))
    return active.to(DTYPE).to(tl.float32) * up.to(tl.float32)


@triton.jit
def _gated_kernel(x_ptr, out_ptr, F, x_stride, IS_SILU: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    gate = tl.load(x_ptr + row * x_stride + f, mask=f < F, other=0.0)
    up = tl.load(x_ptr + row * x_stride + F + f, mask=f < F, other=0.0)
    y = _gated(gate, up, IS_SILU, x_ptr.dtype.element_ty)
    tl.store(out_ptr + row * F + f, y.to(out_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _gated_fp8_kernel(
    x_ptr, out_ptr, scale_ptr, F, x_stride, IS_SILU: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    gate = tl.load(x_ptr + row * x_stride + f, mask=f < F, other=0.0)
    up = tl.load(x_ptr + row * x_stride + F + f, mask=f < F, other=0.0)
    y = _gated(gate, up, IS_SILU, x_ptr.dtype.element_ty)
    scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / 448.0
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * F + f, (y / scale).to(out_ptr.dtype.element_ty), mask=f < F)


def gated_activation(gate_up_TF2: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
    """Give act(gate) * up, [T, F], from rows that hold gate [F], then up [F]."""
    tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty(tokens, width, dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    block = min(BLOCK, power_of_2(width))
    _gated_kernel[(tokens, ceil_div(width, block))](
        gate_up_TF2,
        out_TF,
        width,
        gate_up_TF2.stride(0),
        activation == "silu",
        block,
        overlaps_launches(out_TF.device),
        **launch_options(out_TF.device, 4),
    )
    return out_TF


def gated_activation_fp8(gate_up_TF2: Tensor, activation: Literal["silu", "gelu_tanh"]) -> tuple[Tensor, Tensor]:
    """Like `gated_activation`, as float8 e4m3 [T, F] and the scale of each row, float32 [T]."""
    tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=gate_up_TF2.device)
    scale_T = torch.empty(tokens, dtype=torch.float32, device=gate_up_TF2.device)
    block = power_of_2(width)
    _gated_fp8_kernel[(tokens,)](
        gate_up_TF2,
        out_TF,
        scale_T,
        width,
        gate_up_TF2.stride(0),
        activation == "silu",
        block,
        overlaps_launches(out_TF.device),
        **launch_options(out_TF.device, min(16, max(1, block // 1024))),
    )
    return out_TF, scale_T
