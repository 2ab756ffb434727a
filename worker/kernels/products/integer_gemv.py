# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix-vector products of a single decode row with words of 4 or 6 bits, by dot products of integers.

A GPU multiplies two bytes by two integers of 16 bits and adds them up in one instruction. The codes of a word are two
times four bytes after a shift and two ands. The row becomes integers of 16 bits: 32 channels share a factor, so that
the largest is 32,000 or so. What that changes is 1/128 of what bfloat16 rounds of the largest of them. Sums of 32
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
from mgpu.worker.kernels.products.widen import split_scales
from mgpu.worker.kernels.runtime import INTERPRETED, ceil_div, launch_options, overlaps_launches, wait_for_inputs
from mgpu.worker.quantization.packing import PackedWeight

_PACK = tl.constexpr("prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $4, $5, 0x5410;")
"""Two pairs of integers of 16 bits."""
_DOT = tl.constexpr(
    "{ .reg .b32 a, b, s; and.b32 a, $1, 0x0F0F0F0F; shr.u32 b, $1, 4; and.b32 b, b, 0x0F0F0F0F;"
    "dp2a.lo.s32.u32 s, $2, a, 0; dp2a.hi.s32.u32 s, $3, a, s;"
    "dp2a.lo.s32.u32 s, $4, b, s; dp2a.hi.s32.u32 $0, $5, b, s; }"
)
"""The sum of the products of a word's codes and four pairs of integers, two of even parts and two of odd ones."""


_DOT_6 = tl.constexpr(
    "{ .reg .b32 a, b, c, d, s;"
    + "".join(
        f"""
    shr.u32 c, $6, {16 * word}; and.b32 c, c, 0x3333; prmt.b32 c, 0x30201000, 0, c;
    shr.u32 d, $6, {16 * word + 2}; and.b32 d, d, 0x3333; prmt.b32 d, 0x30201000, 0, d;
    and.b32 a, ${4 + word}, 0x0F0F0F0F; or.b32 a, a, c;
    shr.u32 b, ${4 + word}, 4; and.b32 b, b, 0x0F0F0F0F; or.b32 b, b, d;
    dp2a.lo.s32.u32 s, ${7 + word}, a, 0; dp2a.lo.s32.u32 ${word}, ${9 + word}, b, s;
    dp2a.hi.s32.u32 s, ${11 + word}, a, 0; dp2a.hi.s32.u32 ${2 + word}, ${13 + word}, b, s;
    """
        for word in range(2)
    )
    + "}"
)
"""The same of two words with codes of 6 bits, whose upper two bits choose from a table of bytes; the sums of the first
and of the last four parts apart."""


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
def _low_bits(bits):
    return (bits << 16) >> 16


@triton.jit
def _packed(a, b, c, d):
    return tl.inline_asm_elementwise(
        _PACK, "=r,=r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _code(words, high, PART: tl.constexpr, KIND: tl.constexpr):
    code = (words >> (4 * PART)) & 15
    if KIND == 5:
        code |= ((high.to(tl.int32) >> (2 * PART)) & 3) << 4
    return code


@triton.jit
def _run_sums(sums, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """Return the sums of four words each, float32 [rows, runs]."""
    return tl.sum(tl.reshape(sums, [ROWS, RUNS, 4]), 2).to(tl.float32)


@triton.jit
def _places(rows, run, groups, none, GROUP: tl.constexpr, EVEN_K: tl.constexpr, HALF: tl.constexpr):
    """Return where the factors of groups are, [rows, runs]; HALF: of the second sixteen of a run."""
    # ``none`` is 0, which the compiler does not know, and what is called contiguous is so where groups are runs only:
    # so each thread loads what belongs to its own words, and nothing goes through shared memory.
    if GROUP == 16:
        group = tl.max_contiguous(run * 2 + HALF, [8])
    elif GROUP == 32:
        group = run
    else:
        group = tl.max_contiguous(run // (GROUP // 32), [8])
    if not EVEN_K:
        group = tl.minimum(group, groups - 1)
    return rows[:, None] * groups + (group + none)[None, :]


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
    if PAIRS:
        scale, offset = split_scales(scale)
        offset -= 8.0 * scale
    elif super_ptr is not None:
        PAIR: tl.constexpr = 1 if offset_ptr is None else 2
        block = tl.max_contiguous(run // 8, [8])
        if not EVEN_K:
            block = tl.minimum(block, supers - 1)
        super_ptrs = super_ptr + (rows[:, None] * supers + (block + none)[None, :]) * PAIR
        scale = scale.to(tl.float32) * tl.load(super_ptrs).to(tl.float32)
        if offset_ptr is None:
            offset = scale * (-32.0 if KIND == 5 else -8.0)
        else:
            offset = -offset.to(tl.float32) * tl.load(super_ptrs + 1).to(tl.float32)
    else:
        scale = scale.to(tl.float32)
        if offset_ptr is None:
            zero = offset if zero_ptr is not None else scale
            offset = -8.0 * scale
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
    if high_ptr is not None:
        high_ptr += none * 4  # of 8 bytes, so that as many of its elements are loaded at once as of words
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
        places = _places(rows, run, groups, none, GROUP, EVEN_K, 0)
        scale, offset = _load_factors(scale_ptr, zero_ptr, offset_ptr, places, mask)
    return words, high, scale, offset


@triton.jit
def integer_sums(
    words, high, raw_scale, raw_offset,
    x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, rows, K, words_per_row, groups, supers, none,
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
        places = _places(rows, run, groups, none, GROUP, EVEN_K, 0)
        if super_ptr is None:
            stored_scale, stored_offset = raw_scale, raw_offset
        else:
            stored_scale, stored_offset = _load_factors(scale_ptr, zero_ptr, offset_ptr, places, None)
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
        if not ASSEMBLY:
            sums = _code(words, high, 0, KIND) * _low_bits(q0) + _code(words, high, 1, KIND) * _low_bits(q1)
            sums += _code(words, high, 2, KIND) * _low_bits(q2) + _code(words, high, 3, KIND) * _low_bits(q3)
            last_sums = _code(words, high, 4, KIND) * _low_bits(q4) + _code(words, high, 5, KIND) * _low_bits(q5)
            last_sums += _code(words, high, 6, KIND) * _low_bits(q6) + _code(words, high, 7, KIND) * _low_bits(q7)
            if GROUP != 16:
                sums += last_sums
        elif GROUP == 16:
            first_even, first_odd = _packed(q0, q2, q1, q3)
            last_even, last_odd = _packed(q4, q6, q5, q7)
            sums, last_sums = tl.inline_asm_elementwise(
                _DOT_6, "=r,=r,=r,=r" + ",r" * 11, [words, high, first_even, first_odd, last_even, last_odd],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            first_even, last_even = _packed(q0, q2, q4, q6)
            first_odd, last_odd = _packed(q1, q3, q5, q7)
            sums = tl.inline_asm_elementwise(
                _DOT, "=r,r,r,r,r,r", [words, first_even, last_even, first_odd, last_odd],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        if GROUP == 16:
            places = _places(rows, run, groups, none, GROUP, EVEN_K, 1)
            last_scale, last_offset = _load_factors(scale_ptr, zero_ptr, offset_ptr, places, None)
            last_scale, last_offset = _factors(
                last_scale, last_offset, zero_ptr, offset_ptr, super_ptr, rows, run, supers, none, places,
                PAIRS, KIND, EVEN_K,
            )  # fmt: skip
            acc += last_scale * (_run_sums(last_sums, BLOCK_N, RUNS) * unit)
            acc += last_offset * (_run_sums(last_x, 1, RUNS) * unit)
        else:
            first_x += last_x
        acc += scale * (_run_sums(sums, BLOCK_N, RUNS) * unit) + offset * (_run_sums(first_x, 1, RUNS) * unit)
        if AHEAD:
            words, high, raw_scale, raw_offset = next_words, next_high, next_scale, next_offset
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["none", "supers"])
def _integer_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, bias_ptr, y_ptr,
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
        x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, rows, K, words_per_row, groups, supers,
        none, PAIRS, KIND, GROUP, BLOCK_N, BLOCK_W, EVEN, EVEN_K, AHEAD, ASSEMBLY,
    )  # fmt: skip
    store_outputs(y, rows, bias_ptr, y_ptr, N, GATE, BLOCK_N)


def multiplies_integers(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Return True for what `integer_gemv` multiplies: codes of 4 or 6 bits. float32 would lose half of its digits."""
    if dtype.itemsize != 2 or weight.rows > 1 or not takes(weight):
        return False
    return weight.group == 16 if weight.kind == "int6" else weight.kind == "int4" and weight.group % 32 == 0


def takes_integers(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Return True for what `integer_gemv` is fastest for: codes of 6 bits, and of 4 bits all of ``--quant``.

    Others of 4 bits if there are many outputs; with scales of scales also if there are few (docs/kernels.md).
    """
    if not multiplies_integers(weight, dtype):
        return False
    outputs, is_nested = len(weight.words), weight.supers is not None
    is_any = weight.kind == "int6" or weight.has_pairs
    return is_any or outputs > 4 * weight.k or (is_nested and outputs <= weight.k)


def choose_tiling(weight: PackedWeight) -> IntegerGemvTiling:
    """Pick tiles, as measured on an H200: small ones where the scales of groups have scales."""
    (outputs, words_per_row), k = weight.words.shape, weight.k
    if weight.supers is None:
        if outputs > 4 * k:
            return IntegerGemvTiling(8, 256, 2)
        return IntegerGemvTiling(8, 512, 4) if words_per_row > 512 else IntegerGemvTiling(8, 256, 2, ahead=True)
    if outputs <= k:
        return IntegerGemvTiling(4, 256, 2, ahead=True)
    return IntegerGemvTiling(4, 128, 1, ahead=True) if weight.kind == "int6" else IntegerGemvTiling(8, 128, 1)


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
    scales, zeros, offsets, supers, high, _ = given.tensors
    even = words_per_row % tiling.block_w == 0
    _integer_gemv_kernel[(ceil_div(outputs, tiling.block_n),)](
        x_1K, weight.words, scales, zeros, offsets, supers, high, bias_N, out_1N, n, k, words_per_row, *given.sizes, 0,
        weight.has_pairs, *given.constants[:2],
        GATES[gate], tiling.block_n, tiling.block_w, even, even and k == words_per_row * 8, tiling.ahead,
        overlaps_launches(x_1K.device), not INTERPRETED, **launch_options(x_1K.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_1N
