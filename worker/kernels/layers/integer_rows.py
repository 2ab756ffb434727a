# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Rows as integers of 16 bits for products with int8 weights, in the order of packed words.

`integer_rows` in plain torch is the reference (worker/quantization/integer_rows.py).
"""

# T tokens, K input channels

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.layers.float8_quantize import width_and_warps, word_channels, words_of
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, wait_for_inputs
from mgpu.worker.quantization.float8_rows import BLOCK
from mgpu.worker.quantization.integer_rows import IntegerRows


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _integer_rows_kernel(
    x_ptr, words_ptr, scale_ptr, K, words_per_row, x_stride, WIDTH: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = word_channels(WIDTH)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    most = tl.reduce(tl.reduce(tl.abs(x), 1, _larger), 0, _larger)  # a NaN makes the scale one
    most = tl.maximum(most, 1e-30, propagate_nan=tl.PropagateNan.ALL)
    # Neighbours of 1.5 * 2^23 are 1 apart, so the lower bits of the sum are the rounded number.
    bits = (x * tl.math.div_rn(32639.0, most) + 12582912.0).to(tl.int32, bitcast=True)
    word = tl.arange(0, WIDTH)
    words_ptr += row * 2 * words_per_row + word
    tl.store(words_ptr, words_of(((bits - 0x4B400000 + 128) >> 8) & 255), mask=word < words_per_row)
    tl.store(words_ptr + words_per_row, words_of(bits & 255), mask=word < words_per_row)
    tl.store(scale_ptr + row, tl.math.div_rn(most, 32639.0))


def integer_rows(x_TK: Tensor) -> IntegerRows:
    """Return rows (contiguous within) as integers of 16 bits."""
    tokens, k = x_TK.shape
    words = torch.empty(2 * tokens, ceil_div(k, BLOCK) * BLOCK // 4, dtype=torch.int32, device=x_TK.device)
    scale_T = torch.empty(tokens, dtype=torch.float32, device=x_TK.device)
    width, warps = width_and_warps(words.shape[1])
    _integer_rows_kernel[(tokens,)](
        x_TK, words, scale_T, k, words.shape[1], x_TK.stride(0), width, overlaps_launches(x_TK.device),
        **launch_options(x_TK.device, warps),
    )  # fmt: skip
    return IntegerRows(words.view(torch.int8), scale_T)
