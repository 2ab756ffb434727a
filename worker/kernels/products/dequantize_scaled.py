# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Unpack a weight of a quantized checkpoint on the device: any kind, group, zero points and order of inputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, wait_for_inputs
from mgpu.worker.quantization.packing import WORDS, PackedWeight, ordered_parts

ROWS = 32
"""Output channels per program."""
KINDS = {
    "int8": 0, "fp8": 1, "int4": 2, "fp4": 3, "nl4": 4, "int6": 5, "int5": 6, "int3": 7, "int2": 8,
}  # fmt: skip


@triton.jit
def stored_value(words, PART: tl.constexpr, KIND: tl.constexpr):
    """Return the q of a part of each word as float32."""
    if KIND == 0:
        value = ((words << (24 - 8 * PART)) >> 24).to(tl.float32)
    elif KIND == 1:  # e4m3's exponent and mantissa, moved to float32's, are the value times 2^-120
        bits = ((words << (24 - 8 * PART)) & -0x80000000) | (((words >> (8 * PART)) & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    elif KIND == 2:
        value = (((words >> (4 * PART)) & 0xF) - 8).to(tl.float32)
    else:  # e2m1's are the value times 2^-126
        bits = ((words << (28 - 4 * PART)) & -0x80000000) | (((words >> (4 * PART)) & 0x7) << 22)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    return value


@triton.jit
def load_scale(pointers, mask):
    """Return scales as float32; bytes are powers of two with a bias of 127."""
    scale = tl.load(pointers, mask=mask, other=0)
    if pointers.dtype.element_ty == tl.uint8:
        scale = tl.exp2(scale.to(tl.float32) - 127.0)
    return scale.to(tl.float32)


@triton.jit
def _dequantize_scaled_kernel(
    w_ptr, scale_ptr, zero_ptr, order_ptr, out_ptr, N, K, words_per_row, groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    j = tl.arange(0, 32)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    wait_for_inputs(OVERLAP)  # also keeps ``out`` alive: an earlier product may still read it
    words = tl.load(
        w_ptr + rows[:, None] * words_per_row + (block * 32 + j)[None, :],
        mask=(block * 32 + j < words_per_row)[None, :], other=0,
    )  # fmt: skip
    PARTS: tl.constexpr = 8 if KIND >= 2 else 4
    for part in tl.static_range(PARTS):
        k = block * 256 + j // 4 * 32 + part * 4 + j % 4 if KIND >= 2 else (block * 4 + part) * 32 + j
        is_input = k < K
        if order_ptr is not None:
            group = tl.load(order_ptr + k, mask=is_input, other=0)
        elif GROUP > 0:
            group = k // GROUP
        else:
            group = k * 0
        mask = is_input[None, :] & (n < N)[:, None]
        value = stored_value(words, part, KIND)
        if zero_ptr is not None:
            value -= tl.load(zero_ptr + rows[:, None] * groups + group[None, :], mask=mask, other=0).to(tl.float32)
        value *= load_scale(scale_ptr + (rows // SHARED)[:, None] * groups + group[None, :], mask)
        tl.store(out_ptr + rows[:, None] * K + k[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_scaled(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] in ``dtype``; `packing.dequantize` is the reference."""
    out_NK = torch.empty(len(weight.words), weight.k, dtype=dtype, device=weight.words.device)
    first = 0
    for part in ordered_parts(weight):
        _launch(part, out_NK[first : first + len(part.words)])
        first += len(part.words)
    return out_NK


def _launch(weight: PackedWeight, out_NK: Tensor) -> None:
    n, words_per_row = weight.words.shape
    _dequantize_scaled_kernel[(ceil_div(n, ROWS), ceil_div(words_per_row, WORDS))](
        weight.words, weight.scales, weight.zeros, weight.order, out_NK, n, weight.k, words_per_row,
        weight.scales.shape[1], KINDS[weight.kind], weight.group, weight.rows, ROWS,
        overlaps_launches(out_NK.device), **launch_options(out_NK.device, 4),
    )  # fmt: skip
