# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""GGUF's words as operands of a warpgroup's product: groups with offsets, scales of scales, and codes of 4 to 6 bits.

Codes are unsigned, and a weight is ``code * scale + offset``. Codes of four bits stay where they are in their word, as
`widen` has them. Longer codes are put together in the lowest bits of a half of a register, where five or six bits are
the bfloat16 ``code * 2^-133`` as well. What rounding a scale to bfloat16 changes is made up for in the offset, for the
middle code; without an offset, codes are moved by a whole number of rounded scales, and weights are rounded once.
"""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mgpu.worker.kernels.products.warpgroup.widen import GROUPS, PAIRS, SUM_FACTOR, spread_runs, twice
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


@gluon.jit
def _load_half(
    scale_ptr, offset_ptr, factor, offset_factor, row, run, groups,
    BITS: gl.constexpr, GROUP: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Return scale and offset of runs of 32 channels, or of half of each, float32 [rows, 8]."""
    group = run * 2 + HALF if GROUP == 16 else run // (GROUP // 32)
    places = row * groups + gl.expand_dims(gl.minimum(group, groups - 1), 0)
    stored = gl.load(scale_ptr + places)
    scale = (stored & 15 if BITS == 2 else stored).to(gl.float32) * factor
    near = scale.to(gl.bfloat16).to(gl.float32)
    offset = near
    if BITS == 2:
        offset = (stored >> 4).to(gl.float32) * offset_factor + (scale - near) * 1.5
    elif offset_ptr is not None:
        offset = gl.load(offset_ptr + places).to(gl.float32) * offset_factor
        offset += (scale - near) * ((1 << BITS) - 1) * 0.5
    return near, offset


@gluon.jit
def load_block_factors(
    scale_ptr, offset_ptr, super_ptr, first_row, N, groups, blocks, block,
    BITS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Return two scales and two offsets of each word.

    The scales are those of the lower and the upper codes of a byte where codes have four bits, else scales and offsets
    are those of the first and the last four codes.
    """
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RUNS)))
    row = gl.expand_dims(gl.minimum(rows, N - 1), 1)
    block = gl.minimum(block, blocks - 1)
    run = block * 8 + gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, RUNS)))
    factor, offset_factor = 1.0, 1.0
    if super_ptr is not None:
        PAIR: gl.constexpr = 2 if BITS == 2 or offset_ptr is not None else 1
        super_ptrs = super_ptr + (row * blocks + block) * PAIR
        factor = gl.load(super_ptrs).to(gl.float32)
        if PAIR == 2:
            offset_factor = -gl.load(super_ptrs + 1).to(gl.float32)
    first, offset = _load_half(scale_ptr, offset_ptr, factor, offset_factor, row, run, groups, BITS, GROUP, 0)
    last, last_offset = first, offset
    if GROUP == 16:
        last, last_offset = _load_half(scale_ptr, offset_ptr, factor, offset_factor, row, run, groups, BITS, GROUP, 1)
    # 2^117 or, for the upper codes of a byte, 2^113; the values of a table are no codes.
    unit: gl.constexpr = 1.0 / SUM_FACTOR if BITS == TABLE else 1.661534994731145e35
    low_scale = twice(first * unit)
    high_scale = twice(last * (unit / 16.0 if BITS == 4 else unit))
    low_offset, high_offset = twice(offset / SUM_FACTOR), twice(last_offset / SUM_FACTOR)
    return (
        spread_runs(low_scale, ROWS, WORDS, RUNS),
        spread_runs(high_scale, ROWS, WORDS, RUNS),
        spread_runs(low_offset, ROWS, WORDS, RUNS),
        spread_runs(high_offset, ROWS, WORDS, RUNS),
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
