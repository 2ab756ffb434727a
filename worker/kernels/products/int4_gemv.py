# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix-vector products of a single decode row with int4 weights: `gemv` for `packing`'s words of eight weights.

Arithmetic, not memory, is scarce here: at 4.3 TB/s one SM has 4.3 issue slots per weight of five bits. A weight costs
1.4 to widen and one to multiply; a scale and an offset are applied once per run of 32 channels, which one thread holds.
"""

# N output channels, K input channels

import triton
import triton.language as tl

from mgpu.worker.kernels.products.gemv_rows import store_outputs, weight_rows
from mgpu.worker.kernels.products.widen import INT4_BIAS, split_scales, widen_to_floats
from mgpu.worker.kernels.runtime import wait_for_inputs


@triton.jit
def _load_words(w_ptrs, first, column, words_per_row, EVEN: tl.constexpr):
    if EVEN:
        words = tl.load(w_ptrs + first)
    else:
        words = tl.load(w_ptrs + first, mask=(first + column < words_per_row)[None, :], other=0)
    return words


@triton.jit
def int4_gemv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    words_per_row,
    GROUP: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Compute BLOCK_N outputs. EVEN_K: K fills the words of a row, and these whole steps of BLOCK_W."""
    RUNS: tl.constexpr = BLOCK_W // 4
    rows = weight_rows(N, GATE, BLOCK_N)
    column = tl.arange(0, BLOCK_W)
    run = tl.arange(0, RUNS)
    groups = tl.cdiv(K, GROUP)
    w_ptrs = w_ptr + rows[:, None] * words_per_row + column[None, :]
    scale_ptrs = scale_ptr + rows[:, None] * groups
    words = _load_words(w_ptrs, 0, column, words_per_row, EVEN_K)
    pairs = tl.load(scale_ptrs + tl.minimum(run * 32 // GROUP, groups - 1)[None, :])
    wait_for_inputs(OVERLAP)

    acc = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for first in range(0, words_per_row, BLOCK_W):
        if first > 0:
            words = _load_words(w_ptrs, first, column, words_per_row, EVEN_K)
            pairs = tl.load(scale_ptrs + tl.minimum((first // 4 + run) * 32 // GROUP, groups - 1)[None, :])
        parts = widen_to_floats(words, 2, ASSEMBLY)
        word_sums = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        x_sums = tl.zeros([BLOCK_W], tl.float32)
        c = first + column
        for part in tl.static_range(8):
            k = c // 4 * 32 + part * 4 + c % 4
            if EVEN_K:
                x = tl.load(x_ptr + k).to(tl.float32)
            else:
                x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            word_sums += parts[part] * x[None, :]
            x_sums += x
        run_sums = tl.sum(tl.reshape(word_sums, [BLOCK_N, RUNS, 4]), 2)
        run_x = tl.sum(tl.reshape(x_sums, [RUNS, 4]), 1)
        scale, offset = split_scales(pairs)
        acc += scale * run_sums + (offset - INT4_BIAS * scale) * run_x[None, :]

    store_outputs(tl.sum(acc, 1), rows, bias_ptr, y_ptr, N, GATE, BLOCK_N)
