# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Gated activation: act(gate) * up from the stacked product of both, optionally quantized for a float8 product."""

# T tokens, F feed-forward dim of this rank

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.layers.float8_quantize import as_rows, empty_words, store_words, width_and_warps, word_channels
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs
from mgpu.worker.quantization.float8_rows import Float8Rows

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
def _load_gated(x_ptr, x_scale_ptr, row, f, F, x_stride, IS_SILU: tl.constexpr):
    gate = tl.load(x_ptr + row * x_stride + f, mask=f < F, other=0.0)
    up = tl.load(x_ptr + row * x_stride + F + f, mask=f < F, other=0.0)
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + row)
        gate, up = gate.to(tl.float32) * scale, up.to(tl.float32) * scale
    return _gated(gate, up, IS_SILU, x_ptr.dtype.element_ty)


@triton.jit
def _gated_kernel(
    x_ptr, x_scale_ptr, out_ptr, F, x_stride, IS_SILU: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    y = _load_gated(x_ptr, x_scale_ptr, row, f, F, x_stride, IS_SILU)
    tl.store(out_ptr + row * F + f, y.to(out_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _gated_float8_kernel(
    x_ptr, x_scale_ptr, words_ptr, scale_ptr, F, words_per_row, x_stride,
    IS_SILU: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    f = word_channels(WIDTH)
    wait_for_inputs(OVERLAP)
    y = _load_gated(x_ptr, x_scale_ptr, row, f, F, x_stride, IS_SILU)
    store_words(y, words_ptr, scale_ptr, row, words_per_row, WIDTH)


def gated_activation(gate_up_TF2: Tensor, activation: Activation, scale_T: Tensor | None = None) -> Tensor:
    """Return act(gate) * up, [T, F], from rows that hold gate [F], then up [F].

    With ``scale_T`` (float32) the rows are multiplied by their scales first.
    """
    tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty(tokens, width, dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    block = min(BLOCK, power_of_2(width))
    _gated_kernel[(tokens, ceil_div(width, block))](
        gate_up_TF2, scale_T, out_TF, width, gate_up_TF2.stride(0),
        activation == "silu", block, overlaps_launches(out_TF.device),
        **launch_options(out_TF.device, 4),
    )  # fmt: skip
    return out_TF


def gated_activation_float8(gate_up_TF2: Tensor, activation: Activation, scale_T: Tensor | None = None) -> Float8Rows:
    """Like `gated_activation`, quantized for the next product."""
    tokens, f = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    words, out_scale_T = empty_words(tokens, f, gate_up_TF2.device)
    width, warps = width_and_warps(words.shape[1])
    _gated_float8_kernel[(tokens,)](
        gate_up_TF2, scale_T, words, out_scale_T, f, words.shape[1], gate_up_TF2.stride(0),
        activation == "silu", width, overlaps_launches(words.device),
        **launch_options(words.device, warps),
    )  # fmt: skip
    return as_rows(words, out_scale_T)
