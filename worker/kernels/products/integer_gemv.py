# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix-vector products of a single decode row with words of codes of 2 to 6 bits, by dot products of integers.

A GPU multiplies two bytes by two integers of 16 bits and adds them up in one instruction. The codes of a word become
two times four bytes (`integer_dots`). The row becomes integers of 16 bits: 32 channels share a factor, so that the
largest is 32,000 or so. What that changes is 1/128 of what bfloat16 rounds of the largest of them. Sums of 32
products are exact. So a weight costs one instruction, where widening it and multiplying in float32 costs two and a
half, and scale and offset are applied once a run of 32 channels, as in `quantized_gemv`.
"""

# N output channels, K input channels

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.products.gemv import GATES, store_outputs, weight_rows
from mgpu.worker.kernels.products.group_parts import group_arguments, load_places, load_words, takes
from mgpu.worker.kernels.products.integer_dots import dot_words
from mgpu.worker.kernels.products.widen import split_halves, split_scales
from mgpu.worker.kernels.runtime import INTERPRETED, ceil_div, launch_options, overlaps_launches, wait_for_inputs
from mgpu.worker.quantization.packing import PackedWeight, WeightKind

_WHOLE = ("int4", "int5", "nl4")
"""Kinds whose groups have whole words."""
_HALVES = ("int6", "int3", "int2")
"""Kinds of which a group has one half of each of its words."""


@dataclass(frozen=True, slots=True)
class IntegerGemvTiling:
    """How a product is cut."""

    block_n: int
    """Rows of the weight per program; even where it is gated."""
    block_w: int
    """Words per step."""
    num_warps: int
    ahead: bool = False
    """Whether the words of the next step are loaded before a step is multiplied."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_part(x_ptr, c, K, PART: tl.constexpr, EVEN_K: tl.constexpr):
    k = c // 4 * 32 + PART * 4 + c % 4
    if EVEN_K:  # noqa: SIM108 - compile-time condition
        x = tl.load(x_ptr + k).to(tl.float32)
    else:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return x


@triton.jit
def _rounded(x, factor):
    """Return integers in the lower 16 bits: neighbours of 1.5 * 2^23 are 1 apart, and the lower bits count them."""
    return (x * factor + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _run_sums(sums, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Return the sums of four words each, float32 [rows, runs]."""
    return tl.sum(tl.reshape(sums, [ROWS, RUNS, 4]), 2).to(tl.float32)


@triton.jit
def _places(rows, run, groups, none, GROUP: tl.constexpr, EVEN_K: tl.constexpr):
    """Return where the factors of groups are, [rows, runs]; of groups of 16 those of two are one number."""
    # ``none`` is 0, which the compiler does not know, and what is called contiguous is so where groups are runs only:
    # so each thread loads what belongs to its own words, and nothing goes through shared memory.
    group = run if GROUP <= 32 else run // (GROUP // 32)
    if not EVEN_K:
        group = tl.minimum(group, groups - 1)
    return rows[:, None] * groups + (tl.max_contiguous(group, [8]) + none)[None, :]


@triton.jit
def _load_factors(scale_ptr, zero_ptr, offset_ptr, places, mask):
    """Load what groups have: a scale, and an offset or a zero point; the scale again if there is neither."""
    scale = tl.load(scale_ptr + places, mask=mask)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + places, mask=mask)
    elif zero_ptr is not None:
        offset = tl.load(zero_ptr + places, mask=mask)
    else:
        offset = scale
    return scale, offset


@triton.jit
def _factors(
    scale, offset, zero_ptr, offset_ptr, super_ptr, rows, run, supers, none, places,
    PAIRS: tl.constexpr, KIND: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Return scale and offset, float32 [rows, runs], of unsigned codes, of what `_load_factors` has loaded."""
    MIDDLE: tl.constexpr = 32.0 if KIND == 5 else 16.0 if KIND == 6 else 4.0 if KIND == 7 else 8.0
    if PAIRS:
        scale, offset = split_scales(scale)
        offset -= 8.0 * scale
    elif super_ptr is not None:
        block = run // 8
        if not EVEN_K:
            block = tl.minimum(block, supers - 1)
        factors = tl.load(super_ptr + rows[:, None] * supers + (tl.max_contiguous(block, [8]) + none)[None, :])
        if KIND == 8:  # a byte has both
            offset = (scale >> 4) & 15
            scale = scale & 15
        if factors.dtype == tl.int32:
            of_scale, of_offset = split_halves(factors)
            scale = scale.to(tl.float32) * of_scale
            offset = -offset.to(tl.float32) * of_offset
        else:
            scale = scale.to(tl.float32) * factors.to(tl.float32)
            offset = scale * -MIDDLE
    else:
        scale = scale.to(tl.float32)
        if offset_ptr is None:
            zero = offset if zero_ptr is not None else scale
            offset = -MIDDLE * scale
            if zero_ptr is not None:
                offset -= zero.to(tl.float32) * scale
        else:
            offset = offset.to(tl.float32)
            if zero_ptr is not None:
                offset -= tl.load(zero_ptr + places).to(tl.float32) * scale
    return scale, offset


@triton.jit
def load_step(
    w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, rows, first, words_per_row, groups, none,
    GROUP: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr, IS_THERE: tl.constexpr,
):  # fmt: skip
    """Load the words of a step, the upper bits of their codes, and their factors. IS_THERE: the row is not over."""
    column = first + tl.arange(0, BLOCK_W)
    run = first // 4 + tl.arange(0, BLOCK_W // 4)
    # Of words and of their upper bits, whatever their size, four elements are loaded at once.
    if w_ptr.dtype.element_ty == tl.int16:
        w_ptr += none * 4
    if high_ptr is not None:
        high_ptr += none * 4
    if EVEN and IS_THERE:
        words, high = load_places(w_ptr, high_ptr, rows[:, None] * words_per_row + column[None, :], None, True)
    elif EVEN and super_ptr is None:
        there = first < words_per_row
        words, high = load_places(w_ptr, high_ptr, rows[:, None] * words_per_row + column[None, :], there, False)
    else:
        words, high = load_words(w_ptr, high_ptr, rows, column, words_per_row, False)
    scale, offset = words, words
    if super_ptr is None:  # else there is too much to hold
        mask = None if IS_THERE else first < words_per_row
        places = _places(rows, run, groups, none, GROUP, EVEN_K)
        scale, offset = _load_factors(scale_ptr, zero_ptr, offset_ptr, places, mask)
    return words, high, scale, offset


@triton.jit
def integer_sums(
    words, high, raw_scale, raw_offset,
    x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows, K,
    words_per_row, groups, supers, none,
    PAIRS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr, EVEN_K: tl.constexpr, AHEAD: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return the products of x and these rows, of which `load_step` has loaded the first step.

    EVEN: the words of a row fill whole steps of BLOCK_W; EVEN_K: and K fills the words. AHEAD: the next step is loaded
    before this one is multiplied.
    """
    RUNS: tl.constexpr = BLOCK_W // 4
    column = tl.arange(0, BLOCK_W)
    acc = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for first in range(0, words_per_row, BLOCK_W):
        if AHEAD:
            next_words, next_high, next_scale, next_offset = load_step(
                w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr,
                rows, first + BLOCK_W, words_per_row, groups, none, GROUP, BLOCK_W, EVEN, EVEN_K, False,
            )  # fmt: skip
        elif first > 0:
            words, high, raw_scale, raw_offset = load_step(
                w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, rows, first, words_per_row, groups, none,
                GROUP, BLOCK_W, EVEN, EVEN_K, True,
            )  # fmt: skip
        run = first // 4 + tl.arange(0, RUNS)
        places = _places(rows, run, groups, none, GROUP, EVEN_K)
        if super_ptr is None:
            stored_scale, stored_offset = raw_scale, raw_offset
        else:
            stored_scale, stored_offset = _load_factors(scale_ptr, zero_ptr, offset_ptr, places, None)
        if GROUP == 16:
            pair = stored_scale.to(tl.int32)
            stored_scale, last_scale = (pair << 24) >> 24, (pair << 16) >> 24
            stored_offset = stored_scale
        scale, offset = _factors(
            stored_scale, stored_offset, zero_ptr, offset_ptr, super_ptr, rows, run, supers, none, places,
            PAIRS, KIND, EVEN_K,
        )  # fmt: skip
        c = (first + column)[None, :]  # of one row, so that all that follows has the layout of the words
        x0, x1 = _load_part(x_ptr, c, K, 0, EVEN_K), _load_part(x_ptr, c, K, 1, EVEN_K)
        x2, x3 = _load_part(x_ptr, c, K, 2, EVEN_K), _load_part(x_ptr, c, K, 3, EVEN_K)
        x4, x5 = _load_part(x_ptr, c, K, 4, EVEN_K), _load_part(x_ptr, c, K, 5, EVEN_K)
        x6, x7 = _load_part(x_ptr, c, K, 6, EVEN_K), _load_part(x_ptr, c, K, 7, EVEN_K)
        most = _larger(_larger(tl.abs(x0), tl.abs(x1)), _larger(tl.abs(x2), tl.abs(x3)))
        most = _larger(most, _larger(_larger(tl.abs(x4), tl.abs(x5)), _larger(tl.abs(x6), tl.abs(x7))))
        even, odd = tl.split(tl.reshape(most, [1, RUNS * 2, 2]))
        even, odd = tl.split(tl.reshape(_larger(even, odd), [1, RUNS, 2]))
        most = _larger(_larger(even, odd), 1e-30)
        factor = tl.reshape(tl.broadcast_to((32000.0 / most)[:, :, None], [1, RUNS, 4]), [1, BLOCK_W])
        unit = most / 32000.0
        q0, q1, q2, q3 = _rounded(x0, factor), _rounded(x1, factor), _rounded(x2, factor), _rounded(x3, factor)
        q4, q5, q6, q7 = _rounded(x4, factor), _rounded(x5, factor), _rounded(x6, factor), _rounded(x7, factor)
        # Four times the bits of 1.5 * 2^23, which overflow.
        first_x, last_x = q0 + q1 + q2 + q3 - 0x2D000000, q4 + q5 + q6 + q7 - 0x2D000000
        sums, last_sums = dot_words(words, high, table_ptr, q0, q1, q2, q3, q4, q5, q6, q7, KIND, GROUP, ASSEMBLY)
        if GROUP == 16:
            last_scale, last_offset = _factors(
                last_scale, last_scale, zero_ptr, offset_ptr, super_ptr, rows, run, supers, none, places,
                PAIRS, KIND, EVEN_K,
            )  # fmt: skip
            acc += last_scale * (_run_sums(last_sums, BLOCK_N, RUNS) * unit)
            acc += last_offset * (_run_sums(last_x, 1, RUNS) * unit)
        else:
            first_x += last_x
        acc += scale * (_run_sums(sums, BLOCK_N, RUNS) * unit)
        if KIND != 4:  # whose values are signed
            acc += offset * (_run_sums(first_x, 1, RUNS) * unit)
        if AHEAD:
            words, high, raw_scale, raw_offset = next_words, next_high, next_scale, next_offset
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["none", "supers"])
def _integer_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, bias_ptr, y_ptr,
    N, K, words_per_row, groups, supers, none,
    PAIRS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N outputs."""
    rows = weight_rows(N, GATE, BLOCK_N)
    words, high, scale, offset = load_step(
        w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, rows, 0, words_per_row, groups, none,
        GROUP, BLOCK_W, EVEN, EVEN_K, True,
    )  # fmt: skip
    wait_for_inputs(OVERLAP)
    y = integer_sums(
        words, high, scale, offset,
        x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows, K, words_per_row,
        groups, supers, none, PAIRS, KIND, GROUP, BLOCK_N, BLOCK_W, EVEN, EVEN_K, AHEAD, ASSEMBLY,
    )  # fmt: skip
    store_outputs(y, rows, bias_ptr, y_ptr, N, GATE, BLOCK_N)


def takes_integers(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Return True for what `integer_gemv` multiplies: codes of 2 to 6 bits. float32 would lose half of its digits."""
    if dtype.itemsize != 2 or weight.rows > 1 or not takes(weight):
        return False
    if weight.kind in _HALVES:
        return weight.group == 16
    return weight.kind in _WHOLE and weight.group > 0 and weight.group % 32 == 0


_SMALL, _SMALL_AHEAD = IntegerGemvTiling(8, 256, 2), IntegerGemvTiling(8, 256, 2, ahead=True)
_LONG, _LONG_AHEAD = IntegerGemvTiling(8, 512, 4), IntegerGemvTiling(8, 512, 4, ahead=True)
_NARROW, _WHOLE_ROWS = IntegerGemvTiling(8, 128, 1), IntegerGemvTiling(8, 512, 2)
_FEW_ROWS = IntegerGemvTiling(4, 256, 2, ahead=True)
_NESTED: dict[WeightKind, tuple[IntegerGemvTiling, IntegerGemvTiling, IntegerGemvTiling]] = {
    "int4": (_NARROW, _LONG, _LONG),
    "int5": (_SMALL_AHEAD, _SMALL, _FEW_ROWS),
    "int6": (_SMALL, _SMALL, _FEW_ROWS),
    "int3": (_NARROW, _SMALL, _LONG_AHEAD),
    "int2": (IntegerGemvTiling(8, 128, 1, ahead=True), _LONG_AHEAD, _LONG_AHEAD),
    "nl4": (_SMALL_AHEAD, _LONG_AHEAD, _LONG),
}
"""Where scales have scales: tiles of more than four times as many outputs as inputs, of more, and of others."""


def choose_tiling(weight: PackedWeight) -> IntegerGemvTiling:
    """Pick tiles, as measured on an H200 (docs/kernels.md)."""
    outputs, k = len(weight.words), weight.k
    if weight.supers is not None:
        return _NESTED[weight.kind][0 if outputs > 4 * k else 1 if outputs > k else 2]
    if outputs > 4 * k:
        return _SMALL
    if weight.kind == "int4":
        return _WHOLE_ROWS if outputs <= k <= 4096 else _LONG
    return _SMALL if outputs > k else _FEW_ROWS


def integer_gemv(
    x_1K: Tensor,
    weight: PackedWeight,
    *,
    gate: Activation | None = None,
    bias_N: Tensor | None = None,
    tiling: IntegerGemvTiling | None = None,
) -> Tensor:
    """Multiply one row by the dequantized weight's transpose; ``gate`` as in `gemv`."""
    k = x_1K.shape[-1]
    outputs, words_per_row = weight.words.shape
    if x_1K.shape[0] != 1 or k != weight.k:
        raise ValueError(f"integer_gemv takes 1 row of {weight.k} channels, got {x_1K.shape[0]} of {k}")
    n = outputs // (2 if gate else 1)
    tiling = tiling or choose_tiling(weight)
    out_1N = torch.empty(1, n, dtype=x_1K.dtype, device=x_1K.device)
    given = group_arguments(weight)
    scales, zeros, offsets, supers, high, table = given.tensors
    groups, num_supers = given.sizes
    if supers is not None and supers.shape[-1] == 2:
        supers = supers.view(torch.int32)  # both are loaded at once
    if weight.group == 16 and scales is not None:
        scales, groups = scales.view(torch.int16), groups // 2
    even = words_per_row % tiling.block_w == 0
    _integer_gemv_kernel[(ceil_div(outputs, tiling.block_n),)](
        x_1K, weight.words, scales, zeros, offsets, supers, high, table, bias_N, out_1N, n, k, words_per_row,
        groups, num_supers, 0,
        weight.has_pairs, *given.constants[:2],
        GATES[gate], tiling.block_n, tiling.block_w, even, even and k == words_per_row * 8, tiling.ahead,
        overlaps_launches(x_1K.device), not INTERPRETED, **launch_options(x_1K.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_1N
