# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Quantize rows for float8 products, in the order of packed words.

A tile is [words of the row, 4 parts]: words lie along threads, so that loads are wide and a word's four values meet in
one thread.
"""

# T tokens, K input channels, B blocks of K

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs
from mgpu.worker.quantization.float8_rows import BLOCK, ROWS_AT_ONCE, Float8Blocks, Float8Rows
from mgpu.worker.quantization.packing import WORDS

BLOCKS_PER_PROGRAM = 32
"""Blocks of 128 channels that a program of `_quantize_blocks_kernel` has."""


@triton.jit
def word_channels(WIDTH: tl.constexpr):
    """Return the channels [WIDTH, 4] that the words of a row hold."""
    word = tl.arange(0, WIDTH)
    return (word // 32 * 128 + word % 32)[:, None] + (32 * tl.arange(0, 4))[None, :]


@triton.jit
def words_of(octets):
    """Return words [WIDTH] of bytes [WIDTH, 4], which are integers from 0 to 255."""
    return tl.sum(octets << (8 * tl.arange(0, 4))[None, :], 1)


@triton.jit
def quantize_words(y):
    """Return words [WIDTH] of e4m3 and the scale of a row [WIDTH, 4]: `float8_rows.quantize_rows` for one row."""
    most = tl.maximum(tl.max(tl.max(tl.abs(y), 1), 0), 1e-30)
    octets = (y * tl.math.div_rn(448.0, most)).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    return words_of(octets), tl.math.div_rn(most, 448.0)


@triton.jit
def store_words(y, words_ptr, scale_ptr, row, words_per_row, WIDTH: tl.constexpr):
    """Quantize a row [WIDTH, 4] and store its words and its scale."""
    words, scale = quantize_words(y)
    tl.store(scale_ptr + row, scale)
    word = tl.arange(0, WIDTH)
    tl.store(words_ptr + row * words_per_row + word, words, mask=word < words_per_row)


@triton.jit
def _quantize_kernel(
    x_ptr, words_ptr, scale_ptr, K, words_per_row, x_stride, WIDTH: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = word_channels(WIDTH)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    store_words(x, words_ptr, scale_ptr, row, words_per_row, WIDTH)


@triton.jit
def _quantize_blocks_kernel(
    x_ptr, words_ptr, scale_ptr, K, words_per_row, tokens, x_stride, BLOCKS: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = BLOCKS * 32
    first = tl.program_id(1) * WIDTH
    word = first + tl.arange(0, WIDTH)
    k = first * 4 + word_channels(WIDTH)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    most = tl.max(tl.reshape(tl.max(tl.abs(x), 1), [BLOCKS, 32]), 1)
    most = tl.maximum(most, 1e-30)
    factors = tl.broadcast_to(tl.math.div_rn(448.0, most)[:, None], [BLOCKS, 32])
    octets = (x * tl.reshape(factors, [WIDTH])[:, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    tl.store(words_ptr + row * words_per_row + word, words_of(octets), mask=word < words_per_row)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(scale_ptr + block * tokens + row, tl.math.div_rn(most, 448.0), mask=block < words_per_row // 32)


def empty_words(tokens: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate words int32 [T, padded K / 4] and scales [T] for kernels to fill."""
    words = torch.empty(tokens, ceil_div(k, BLOCK) * BLOCK // 4, dtype=torch.int32, device=device)
    return words, torch.empty(tokens, dtype=torch.float32, device=device)


def as_rows(words: Tensor, scale_T: Tensor) -> Float8Rows:
    return Float8Rows(words.view(torch.float8_e4m3fn), scale_T)


def width_and_warps(words_per_row: int) -> tuple[int, int]:
    """Return the padded words of a row, and the warps for 8 words with all their parts per thread."""
    width = max(32, power_of_2(words_per_row))
    return width, min(16, max(1, width // 256))


def quantize_rows(x_TK: Tensor) -> Float8Rows:
    """Quantize rows (contiguous within); `float8_rows.quantize_rows` is the reference."""
    tokens, k = x_TK.shape
    words, scale_T = empty_words(tokens, k, x_TK.device)
    width, warps = width_and_warps(words.shape[1])
    _quantize_kernel[(tokens,)](
        x_TK, words, scale_T, k, words.shape[1], x_TK.stride(0), width, overlaps_launches(x_TK.device),
        **launch_options(x_TK.device, warps),
    )  # fmt: skip
    return as_rows(words, scale_T)


def quantize_blocks(x_TK: Tensor) -> Float8Blocks:
    """Quantize rows block by block; `float8_rows.quantize_blocks` is the reference."""
    tokens, k = x_TK.shape
    padded = ceil_div(tokens, ROWS_AT_ONCE) * ROWS_AT_ONCE
    words, _ = empty_words(padded, k, x_TK.device)
    scale_BT = torch.empty(words.shape[1] // WORDS, padded, dtype=torch.float32, device=x_TK.device)
    blocks = min(BLOCKS_PER_PROGRAM, power_of_2(len(scale_BT)))
    _quantize_blocks_kernel[(tokens, ceil_div(len(scale_BT), blocks))](
        x_TK, words, scale_BT, k, words.shape[1], padded, x_TK.stride(0), blocks, overlaps_launches(x_TK.device),
        **launch_options(x_TK.device, width_and_warps(blocks * WORDS)[1]),
    )  # fmt: skip
    return Float8Blocks(words.view(torch.float8_e4m3fn), scale_BT.t())
