# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Unpack a quantized weight on the device, for products of many rows by a library."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.products.dequantize_groups import dequantize_groups
from mgpu.worker.kernels.products.dequantize_scaled import dequantize_scaled
from mgpu.worker.kernels.products.group_parts import RUN_KINDS, takes
from mgpu.worker.kernels.products.widen import KINDS, widen_int4, widen_octets
from mgpu.worker.kernels.runtime import INTERPRETED, ceil_div, launch_options, overlaps_launches, wait_for_inputs
from mgpu.worker.quantization.packing import WORDS, PackedWeight

ROWS = 32
"""Output channels per program."""


@triton.jit
def _in_order(parts, ROWS: tl.constexpr):
    """Return the eight parts of 32 words as 256 channels, so that they are stored side by side."""
    even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
    odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
    by_run = tl.reshape(tl.join(even, odd), [ROWS, 8, 4, 8])
    return tl.reshape(tl.permute(by_run, [0, 1, 3, 2]), [ROWS, 256])


@triton.jit
def _dequantize_kernel(
    w_ptr, scale_ptr, out_ptr, N, K, words_per_row,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    j = tl.arange(0, 32)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    wait_for_inputs(OVERLAP)  # also keeps ``out`` alive: an earlier product may still read it
    words = tl.load(w_ptr + rows[:, None] * words_per_row + (block * 32 + j)[None, :])
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if KIND == 2:
        groups = tl.cdiv(K, GROUP)
        group = tl.minimum((block * 256 + j // 4 * 32) // GROUP, groups - 1)
        parts = widen_int4(words, tl.load(scale_ptr + rows[:, None] * groups + group[None, :]), dtype, ASSEMBLY)
        k = block * 256 + tl.arange(0, 256)
        values = _in_order(parts, ROWS)
        tl.store(out_ptr + rows[:, None] * K + k[None, :], values, mask=(n < N)[:, None] & (k < K)[None, :])
    else:
        parts = widen_octets(words, KIND, dtype, ASSEMBLY)
        scale = tl.load(scale_ptr + rows)[:, None]
        for part in tl.static_range(4):
            k = (block * 4 + part) * 32 + j
            value = (parts[part].to(tl.float32) * scale).to(dtype)
            tl.store(out_ptr + rows[:, None] * K + k[None, :], value, mask=(n < N)[:, None] & (k < K)[None, :])


def dequantize_packed(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] in ``dtype``; `packing.dequantize` is the reference."""
    if not weight.is_simple:
        is_in_words = weight.kind in RUN_KINDS and takes(weight)
        return dequantize_groups(weight, dtype) if is_in_words else dequantize_scaled(weight, dtype)
    n, words_per_row = weight.words.shape
    out_NK = torch.empty(n, weight.k, dtype=dtype, device=weight.words.device)
    _dequantize_kernel[(ceil_div(n, ROWS), words_per_row // WORDS)](
        weight.words, weight.scales, out_NK, n, weight.k, words_per_row,
        KINDS[weight.kind], weight.group, ROWS, overlaps_launches(out_NK.device), not INTERPRETED,
        **launch_options(out_NK.device, 4),
    )  # fmt: skip
    return out_NK
