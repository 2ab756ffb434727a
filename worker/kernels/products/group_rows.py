# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of one row of activations and some rows of packed weights whose groups have scales, in float32.

Words go straight from memory to registers. A thread holds runs of four words; the codes of a run that have one scale
are multiplied and added up first, and the scale is applied to the sum.
"""

import triton
import triton.language as tl

from mgpu.worker.kernels.products.dequantize_scaled import load_scale
from mgpu.worker.kernels.products.group_parts import code_floats, group_factors, load_places
from mgpu.worker.kernels.products.widen import FP4_SCALE, widen_fp4_to_floats, widen_to_floats


@triton.jit
def load_row_words(w_ptr, high_ptr, rows, word, words_per_row, K, KIND: tl.constexpr, EVEN: tl.constexpr):
    """Return words and the upper bits of their codes, [rows, words]; zeros past the inputs. EVEN: there are no such.

    Whether a word has inputs is asked for all words of a run or block at once, so that four are loaded together.
    """
    places = rows[:, None] * words_per_row + word[None, :]
    mask = ((word // 4 * 32 if KIND >= 2 else word // 32 * 128) < K)[None, :]
    words, high = load_places(w_ptr, high_ptr, places, mask, EVEN)
    return words, high


@triton.jit
def _load_inputs(x_ptr, k, K, EVEN: tl.constexpr):
    if EVEN:  # noqa: SIM108 - compile-time condition
        x = tl.load(x_ptr + k).to(tl.float32)
    else:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return x


@triton.jit
def _multiply_runs(
    words, high, x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows,
    K, words_per_row, groups, supers,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Multiply by words of eight codes."""
    RUNS: tl.constexpr = BLOCK_W // 4
    HAS_BIAS: tl.constexpr = KIND != 3 and KIND != 4
    HALVES: tl.constexpr = 2 if GROUP == 16 else 1
    column = tl.arange(0, BLOCK_W)
    acc = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for first in range(0, (K + 7) // 8, BLOCK_W):
        c = first + column
        if first > 0:
            words, high = load_row_words(w_ptr, high_ptr, rows, c, words_per_row, K, KIND, EVEN)
        if KIND == 2:
            floats = widen_to_floats(words, KIND, ASSEMBLY)
        if KIND == 3:
            floats = widen_fp4_to_floats(words, ASSEMBLY)
        run = first // 4 + tl.arange(0, RUNS)
        for half in tl.static_range(HALVES):
            scale, bias = group_factors(
                scale_ptr, zero_ptr, offset_ptr, super_ptr, rows, run * 32 + half * 16, groups, supers,
                KIND, GROUP, SHARED,
            )  # fmt: skip
            if KIND == 3:
                scale *= FP4_SCALE
            word_sums = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
            x_sums = tl.zeros([BLOCK_W], tl.float32)
            for index in tl.static_range(8 // HALVES):
                # A thread's four words have neighbouring inputs.
                k = tl.max_contiguous(tl.multiple_of(c // 4 * 32 + (half * 4 + index) * 4 + c % 4, 4), 4)
                x = _load_inputs(x_ptr, k, K, EVEN)
                if KIND == 2 or KIND == 3:
                    word_sums += floats[half * 4 + index] * x[None, :]
                else:
                    word_sums += code_floats(words, high, table_ptr, half * 4 + index, KIND) * x[None, :]
                x_sums += x
            acc += scale * tl.sum(tl.reshape(word_sums, [BLOCK_N, RUNS, 4]), 2)
            if HAS_BIAS:
                acc += bias * tl.sum(tl.reshape(x_sums, [RUNS, 4]), 1)[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _octet_factors(ptr, rows, block, part, groups, GROUP: tl.constexpr, SHARED: tl.constexpr):
    """Return what a part of some blocks of 32 words of four codes has, float32 [rows, len(block)]."""
    group = tl.minimum((block * 128 + part * 32) // GROUP, groups - 1) if GROUP > 0 else block * 0
    return load_scale(ptr + (rows // SHARED)[:, None] * groups + group[None, :], (rows >= 0)[:, None])


@triton.jit
def _multiply_octets(
    words, x_ptr, w_ptr, scale_ptr, zero_ptr, rows, K, words_per_row, groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Multiply by words of four codes; a block of 32 words has 128 inputs, 32 of them in each part."""
    RUNS: tl.constexpr = BLOCK_W // 4
    ONCE: tl.constexpr = (GROUP == 0 or GROUP % 128 == 0) and zero_ptr is None
    column = tl.arange(0, BLOCK_W)
    acc = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for first in range(0, (K + 3) // 4, BLOCK_W):
        c = first + column
        if first > 0:
            words, _ = load_row_words(w_ptr, None, rows, c, words_per_row, K, KIND, EVEN)
        block = (first // 4 + tl.arange(0, RUNS)) // 8
        parts = widen_to_floats(words, KIND, ASSEMBLY)
        word_sums = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        for part in tl.static_range(4):
            x = _load_inputs(x_ptr, (c // 32 * 4 + part) * 32 + c % 32, K, EVEN)
            products = parts[part] * x[None, :]
            if ONCE:
                word_sums += products
            else:
                sums = tl.sum(tl.reshape(products, [BLOCK_N, RUNS, 4]), 2)
                if zero_ptr is not None:
                    zero = _octet_factors(zero_ptr, rows, block, part, groups, GROUP, 1)
                    sums -= zero * tl.sum(tl.reshape(x, [RUNS, 4]), 1)[None, :]
                acc += sums * _octet_factors(scale_ptr, rows, block, part, groups, GROUP, SHARED)
        if ONCE:
            sums = tl.sum(tl.reshape(word_sums, [BLOCK_N, RUNS, 4]), 2)
            acc += sums * _octet_factors(scale_ptr, rows, block, 0, groups, GROUP, SHARED)
    return tl.sum(acc, 1)


@triton.jit
def multiply_words(
    words, high, x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows,
    K, words_per_row, groups, supers,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return the products [BLOCK_N] of x and some rows, of which ``words`` and ``high`` are the first BLOCK_W words.

    EVEN: K fills whole steps.
    """
    if KIND >= 2:
        y = _multiply_runs(
            words, high, x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows,
            K, words_per_row, groups, supers, KIND, GROUP, SHARED, BLOCK_N, BLOCK_W, EVEN, ASSEMBLY,
        )  # fmt: skip
    else:
        y = _multiply_octets(
            words, x_ptr, w_ptr, scale_ptr, zero_ptr, rows, K, words_per_row, groups,
            KIND, GROUP, SHARED, BLOCK_N, BLOCK_W, EVEN, ASSEMBLY,
        )  # fmt: skip
    return y
