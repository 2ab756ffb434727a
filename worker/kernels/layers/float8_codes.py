# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Rows rounded to float8 for products with words of eight codes of 4 bits.

A run of 32 channels is four words t. Of a word's bytes b lower halves (h = 0) have channels ``8 * b + t``, the upper
ones (h = 1) channels ``8 * b + 4 + t``. Rows have channels in the order (h, t, b): that of codes.
"""

# T tokens, K input channels, S spans

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.layers.float8_quantize import width_and_warps, words_of
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, wait_for_inputs


@dataclass(frozen=True, slots=True)
class SpanRows:
    """Rows in float8 in the order of words of eight codes, with the sums of what they hold."""

    values: Tensor
    """float8 [T, padded K]: place ``16 * h + 4 * t + b`` of 32 has channel ``8 * b + 4 * h + t``."""
    scale_T: Tensor
    sums_TS: Tensor
    """bfloat16 [T, padded S]: the sum of each span, of the rounded values."""
    span: int


@triton.jit
def _float8_words(rounded):
    """Return words [WIDTH] of float8 [WIDTH, 4]."""
    return words_of(rounded.to(tl.uint8, bitcast=True).to(tl.int32))


@triton.jit
def _quantize_spans_kernel(
    x_ptr, words_ptr, scale_ptr, sum_ptr, K, words_per_row, sum_stride, x_stride,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WIDTH)
    k = (word // 8 * 32 + word % 8)[:, None] + (8 * tl.arange(0, 4))[None, :]
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-30)
    rounded = (x * tl.math.div_rn(448.0, most)).to(tl.float8e4nv)
    tl.store(words_ptr + row * words_per_row + word, _float8_words(rounded), mask=word < words_per_row)
    tl.store(scale_ptr + row, tl.math.div_rn(most, 448.0))
    sums = tl.sum(tl.reshape(tl.sum(rounded.to(tl.float32), 1), [WIDTH * 4 // SPAN, SPAN // 4]), 1)
    span = tl.arange(0, WIDTH * 4 // SPAN)
    tl.store(sum_ptr + row * sum_stride + span, sums.to(tl.bfloat16), mask=span < sum_stride)


def quantize_spans(x_TK: Tensor, places: int, span: int) -> SpanRows:
    """Quantize rows (contiguous within), zeros up to ``places`` channels, and sum spans of so many."""
    tokens, k = x_TK.shape
    words = torch.empty(tokens, places // 4, dtype=torch.int32, device=x_TK.device)
    scale_T = torch.empty(tokens, dtype=torch.float32, device=x_TK.device)
    sums_TS = torch.empty(tokens, ceil_div(places // span, 64) * 64, dtype=torch.bfloat16, device=x_TK.device)
    width, warps = width_and_warps(max(words.shape[1], 2 * span))  # eight sums at least, which are copied at once
    _quantize_spans_kernel[(tokens,)](
        x_TK, words, scale_T, sums_TS, k, words.shape[1], sums_TS.shape[1], x_TK.stride(0),
        span, width, overlaps_launches(x_TK.device), **launch_options(x_TK.device, warps),
    )  # fmt: skip
    return SpanRows(words.view(torch.float8_e4m3fn), scale_T, sums_TS, span)
