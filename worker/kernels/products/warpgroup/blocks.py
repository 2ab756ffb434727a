# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""GGUF's words as operands of a warpgroup's product: groups with offsets, scales of scales, and codes of 4 to 6 bits.

Codes are unsigned, and a weight is ``code * scale + offset``. Codes of four bits stay where they are in their word, as
`widen` has them. Longer codes are put together in the lowest bits of a half of a register, where five or six bits are
the bfloat16 ``code * 2^-133`` as well. What rounding a scale to bfloat16 changes is made up for in the offset, for the
middle code; without an offset, codes are moved by a whole number of rounded scales, and weights are rounded once.
"""

import struct

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mgpu.worker.kernels.products.warpgroup.widen import GROUPS, PAIRS, SUM_FACTOR, spread_runs
from mgpu.worker.quantization.packing import NL4, PackedWeight

BLOCKS = gl.constexpr(2)
"""The KIND of such words; `widen` has the others."""
TABLE = gl.constexpr(8)
"""What stands for the bits of codes that choose from a table of 16 values."""
CODE_BITS = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6, "nl4": TABLE.value}


def _table_octets(first: int, octet: int) -> str:
    """Return an octet of four of the table's values in bfloat16, as a number."""
    octets = [int.from_bytes(struct.pack("<f", value)[2:], "little") >> 8 * octet & 255 for value in NL4]
    return hex(int.from_bytes(bytes(octets[first : first + 4]), "little"))


TABLE_OCTETS = gl.constexpr(tuple(_table_octets(first, octet) for octet in range(2) for first in (0, 4, 8, 12)))


def kind_of(weight: PackedWeight) -> int:
    """Return the KIND of a weight's words."""
    is_plain = weight.kind == "int4" and weight.offsets is None and weight.supers is None
    kind: int = (PAIRS if weight.has_pairs else GROUPS if is_plain else BLOCKS).value
    return kind


@gluon.constexpr_function
def tiles_of(octets):
    """Return how 32 numbers of a row, of so many bytes, lie in shared memory: banks differ among rows."""
    return gl.SwizzledSharedLayout(16 // octets, 4 // octets, 2 * octets, [1, 0])


@gluon.constexpr_function
def copy_of(octets, num_warps):
    """Return the layout in which threads copy them."""
    return gl.BlockedLayout([1, 16 // octets], [16 // octets, 2 * octets], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def table_assembly(byte):
    """Return the instructions that look parts 2 * byte and 2 * byte + 1 of two words ($2, $3) up, to $0 and $1.

    A permutation of bytes looks four codes up in eight values; a code's last bit chooses one of two such results.
    """
    text = f"{{ .reg .b32 s, t, m, z, x, y, a, b; prmt.b32 s, $2, $3, {0x40 + 0x11 * byte:#x}; and.b32 t, s, 0x7777;"
    text += "shr.u32 m, s, 3; and.b32 m, m, 0x1111; prmt.b32 m, 0xFF00, 0, m;"
    for octet, name in ((0, "a"), (1, "b")):
        for half, found in ((0, "x"), (1, "y")):
            values = TABLE_OCTETS.value[4 * octet + 2 * half : 4 * octet + 2 * half + 2]
            text += f"mov.b32 z, {values[0]}; prmt.b32 {found}, z, {values[1]}, t;"
        text += f"lop3.b32 {name}, x, y, m, 0xD8;"
    text += "mov.b32 z, 0x80008000; prmt.b32 x, a, b, 0x6240; prmt.b32 y, a, b, 0x7351;"
    return text + "fma.rn.bf16x2 $0, x, $4, z; fma.rn.bf16x2 $1, y, $4, z; }"


@gluon.constexpr_function
def assembly_of(byte, bits, has_offset):
    """Return the instructions that widen parts 2 * byte and 2 * byte + 1 of two words to $0 and $1.

    Given are the words ($2 and $3; of two bits both in $2), their upper bits if there are any, and twice each a scale
    and an offset, if there is one; else the middle of the codes, as a number, times the scale is subtracted.
    """
    lowest = 2 if bits < 4 else 4
    width = bits - lowest
    given = 3 if bits < 4 else 4
    scale, offset = f"${given + (width > 0)}", f"${given + (width > 0) + 2}" if has_offset else "o"
    text = "{ .reg .b32 w, t, a, o, c, z;"
    if not has_offset:
        text += f"mov.b32 c, {(0x8000 + (1 << (bits - 1))) * 0x10001:#x}; mov.b32 z, 0x80008000;"
        text += f"fma.rn.bf16x2 o, {scale}, c, z;"
    if lowest == 4:
        text += f"prmt.b32 w, $2, $3, {('0x7440', '0x7551', '0x7662', '0x7773')[byte]};"
    for index in range(2):
        part = 2 * byte + index
        if lowest == 4:
            text += "shr.u32 w, w, 4;" if index else ""
        else:
            text += f"shr.u32 w, $2, {2 * part};"
        text += f"and.b32 a, w, {'0x000f000f' if lowest == 4 else '0x00030003'};"
        if width:
            shift, mask = width * part - lowest, (((1 << width) - 1) << lowest) * 0x10001
            text += f"shr.u32 t, ${given}, {shift};" if shift >= 0 else f"shl.b32 t, ${given}, {-shift};"
            text += f"and.b32 t, t, {mask:#x}; or.b32 a, a, t;"
        text += f"fma.rn.bf16x2 ${index}, a, {scale}, {offset};"
    return text + "}"


@gluon.constexpr_function
def registers_of(bits, has_offset):
    """Return what these instructions have as operands: two results, words, upper bits, scales and offsets."""
    words, upper = 1 if bits < 4 else 2, 1 if bits in (3, 5, 6) else 0
    return "=r,=r" + ",r" * (words + upper + 2 + 2 * has_offset)


def stored_factors(weight: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Return scales and scales of scales, of a run of 32 channels and of a block as one number."""
    scales, supers = weight.scales, weight.supers
    if weight.group == 16:
        scales = scales.view(torch.int16)
    if supers is not None and supers.shape[2] == 2:
        supers = supers.view(torch.int32)
    return scales, supers


FACTOR_TILES = gl.constexpr(gl.SwizzledSharedLayout(4, 4, 2, [1, 0]))


@gluon.constexpr_function
def factor_layout(num_warps):
    """Return the layout of what runs of 32 channels have, [16 rows a warp, 8]: a thread loads half a row."""
    return gl.BlockedLayout([1, 4], [16, 2], [num_warps, 1], [1, 0])


@gluon.jit
def load_stored(
    scale_ptr, offset_ptr, super_ptr, first_row, N, blocks, block, ROWS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Return scales and offsets [rows, 8] as they are stored, and scales of scales [rows, 1]."""
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    row = gl.expand_dims(gl.minimum(rows, N - 1), 1)
    block = gl.minimum(block, blocks - 1)
    run = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT)), 0)
    places = row * (blocks * 8) + (block * 8 + run)
    scale = gl.load(scale_ptr + places)
    offset, factor = scale, scale
    if offset_ptr is not None:
        offset = gl.load(offset_ptr + places)
    if super_ptr is not None:
        factor = gl.load(super_ptr + (row * blocks + block))
    return scale, offset, factor


@gluon.jit
def _half(bits):
    return bits.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _pair(low, high):
    """Return words of two numbers in bfloat16."""
    low = low.to(gl.bfloat16).to(gl.uint16, bitcast=True).to(gl.int32)
    return low | (high.to(gl.bfloat16).to(gl.uint16, bitcast=True).to(gl.int32) << 16)


@gluon.jit
def _with_offset(scale, offset, BITS: gl.constexpr):
    """Return what is added; what rounding the scale changes is made up for, for the middle code."""
    lost = scale - scale.to(gl.bfloat16).to(gl.float32)
    return (offset + lost * (((1 << BITS) - 1) * 0.5)) / SUM_FACTOR


@gluon.jit
def pair_factors(
    scale, offset, factor, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSET: gl.constexpr, NESTED: gl.constexpr
):
    """Return words of a scale and an offset, or of the two scales of a run; and of its two offsets (2 bits)."""
    # The values of a table are no codes, which are read as their 2^-133.
    UNIT: gl.constexpr = 1.0 / 65536.0 if BITS == TABLE else 1.661534994731145e35
    by_scale, by_offset = 1.0, 1.0
    if NESTED:
        if HAS_OFFSET:
            by_scale, by_offset = _half(factor), -_half(factor >> 16)
        else:
            by_scale = factor.to(gl.float32)
    if BITS == 2:
        stored = scale.to(gl.int32)
        first, last = (stored & 15).to(gl.float32) * by_scale, ((stored >> 8) & 15).to(gl.float32) * by_scale
        first_offset = _with_offset(first, ((stored >> 4) & 15).to(gl.float32) * by_offset, BITS)
        last_offset = _with_offset(last, ((stored >> 12) & 15).to(gl.float32) * by_offset, BITS)
        both, offsets = _pair(first * UNIT, last * UNIT), _pair(first_offset, last_offset)
    elif GROUP == 16:
        stored = scale.to(gl.int32)
        first, last = ((stored << 24) >> 24).to(gl.float32) * by_scale, (stored >> 8).to(gl.float32) * by_scale
        both = _pair(first * UNIT, last * UNIT)
        offsets = both
    else:
        number = scale.to(gl.float32) * by_scale
        added = number * UNIT
        if HAS_OFFSET:
            added = _with_offset(number, offset.to(gl.float32) * by_offset, BITS)
        both = _pair(number * UNIT, added)
        offsets = both
    return both, offsets


@gluon.jit
def store_factors(
    tiles, slot, scale, offset, factor,
    BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSET: gl.constexpr, NESTED: gl.constexpr,
):  # fmt: skip
    """Put the factors of a block into shared memory."""
    both, offsets = pair_factors(scale, offset, factor, BITS, GROUP, HAS_OFFSET, NESTED)
    tiles.index(slot).store(both)
    if BITS == 2:
        tiles.index(slot + 2).store(offsets)


@gluon.jit
def _twice_each(pairs):
    """Return the lower and the upper number of each word, twice each."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;", "=r,=r,r", [pairs],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def load_block_factors(tiles, slot, BITS: gl.constexpr, ROWS: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr):
    """Return two scales and two offsets of each word, twice each.

    The scales are those of the lower and the upper codes of a byte where codes have four bits, else scales and offsets
    are those of the first and the last four codes, if groups have 16 channels.
    """
    PER_RUN: gl.constexpr = gl.SliceLayout(2, RUNS)
    first, second = _twice_each(tiles.index(slot).load(PER_RUN))
    third, fourth = second, second
    if BITS == 4:
        second = gl.inline_asm_elementwise(
            "{ .reg .b32 c, z; mov.b32 c, 0x3D803D80; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, c, z; }",
            "=r,r", [first], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif BITS == 2:
        third, fourth = _twice_each(tiles.index(slot + 2).load(PER_RUN))
    elif BITS == 5 or BITS == TABLE:
        second = first
    return (
        spread_runs(first, ROWS, WORDS, RUNS),
        spread_runs(second, ROWS, WORDS, RUNS),
        spread_runs(third, ROWS, WORDS, RUNS),
        spread_runs(fourth, ROWS, WORDS, RUNS),
    )


@gluon.jit
def widen_codes(
    words, high, first, last, offset, last_offset,
    BYTE: gl.constexpr, BITS: gl.constexpr, HAS_OFFSET: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return parts 2 * BYTE and 2 * BYTE + 1 of each word as bfloat16 [rows, 32], divided by `SUM_FACTOR`."""
    TEXT: gl.constexpr = table_assembly(BYTE) if BITS == TABLE else assembly_of(BYTE, BITS, HAS_OFFSET)
    if BYTE >= 2:
        first, offset = last, last_offset
    if BITS == TABLE:
        given = [words, first]
    elif BITS == 2:
        given = [words, first, offset]
    elif HAS_OFFSET:
        given = [words, high, first, offset]
    else:
        given = [words, high, first]
    low, high = gl.inline_asm_elementwise(
        TEXT, registers_of(BITS, HAS_OFFSET), given, dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
    )
    low = gl.convert_layout(low, OPERAND, assert_trivial=True)
    return low, gl.convert_layout(high, OPERAND, assert_trivial=True)
