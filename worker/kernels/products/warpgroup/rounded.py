# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Words of eight codes as operands of float8 products: a weight is rounded to float8, with the scale of its group.

A code of up to six bits in bits 4 to 9 of a half, below the exponent of 64, is the float16 number ``64 + code``. One
multiplication and addition makes weights of two of them, and one conversion rounds both to e4m3. Scales are multiplied
by a power of two for each output first, so that its largest weight comes near 448, the largest number of e4m3.

What is added, ``offset - 64 * scale``, is rounded to float16, which moves a weight by up to a 64th of the distance
between two codes; rounding to e4m3 moves it by more. Parts p and p + 4 of a word are the halves of one register. The
values of a table are looked up as bytes, and are 1,152 less than their float16 numbers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mgpu.worker.kernels.products.warpgroup.widen import PAIRS
from mgpu.worker.quantization.packing import E2M1, MIDDLES, NL4, WeightKind

TABLES = gl.constexpr({8: tuple(value + 128 for value in NL4), 9: tuple(int(2 * value) + 128 for value in E2M1)})
"""The bytes that codes of four bits choose from, by what stands for their bits."""
ROUNDED_BITS: dict[WeightKind, int] = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6, "nl4": 8, "fp4": 9}
"""What stands for the bits of codes of each kind."""


def middle_of(kind: WeightKind, has_offset: bool) -> float:
    """Return what the float16 number of a code is more than its value."""
    if kind in ("nl4", "fp4"):
        return 1152.0
    return 64.0 if has_offset else 64.0 + MIDDLES[kind]


def layouts(rows: int) -> tuple[object, object, object]:
    """Return how a warpgroup has words [rows, 16], the same as [rows, 4 runs, 4], and numbers of runs, [rows, 4].

    A thread has of words what the tensor core reads from it, and of the last what it computes itself, which is a
    quarter of what it needs.
    """

    def make(shape: list[int], inner: list[list[int]], lanes: list[list[int]]) -> object:
        def rows_of(numbers: tuple[int, ...]) -> list[list[int]]:
            return [[row] + [0] * (len(shape) - 1) for row in numbers if row < rows]

        lanes, warps = [*lanes, *rows_of((1, 2, 4))], rows_of((16, 32))
        return gl.DistributedLinearLayout([*inner, *rows_of((8, 64))], lanes, warps, [], shape)

    words = make([rows, 16], [[0, 4], [0, 8]], [[0, 1], [0, 2]])
    runs = make([rows, 4, 4], [[0, 1, 0], [0, 2, 0]], [[0, 0, 1], [0, 0, 2]])
    return words, runs, make([rows, 4], [], [[0, 1], [0, 2]])


@gluon.constexpr_function
def _codes(bits, word, high):
    """Return the instructions that put ``64 + code`` of parts p and p + 4 of a word into registers a0 to a3."""
    text = ""
    if bits < 4:  # words and upper bits of 16 and 8 bits: the second half of each goes to the upper half
        text += f"prmt.b32 w, {word}, 0, 0x4140;"
    if bits == 6:
        text += f"prmt.b32 h, {high}, 0, 0x4140;"
    elif bits in (3, 5):
        text += f"shl.b32 h, {high}, 12; or.b32 h, h, {high};"
    for part in range(4):
        source, shift = ("w", 2 * part - 4) if bits < 4 else (word, 4 * part - 4)
        if shift:
            text += f"{'shl.b32' if shift < 0 else 'shr.u32'} t, {source}, {abs(shift)};"
        mask = "0x00300030" if bits < 4 else "0x00F000F0"
        text += f"lop3.b32 a{part}, {'t' if shift else source}, {mask}, 0x54005400, 0xEA;"
        if bits in (3, 5, 6):
            width, first = (2, 8) if bits == 6 else (1, 8 if bits == 5 else 6)
            upper = (((1 << width) - 1) << first) * 0x10001
            text += f"shl.b32 t, h, {first - width * part}; lop3.b32 a{part}, a{part}, t, {upper:#x}, 0xF8;"
    return text


@gluon.constexpr_function
def _looked_up(bits, word):
    """Return the same for values of a table, as ``1152 + value``.

    A permutation of bytes looks four codes up in eight values; a code's last bit chooses one of two such results.
    """
    values = TABLES.value[bits]
    octets = [hex(int.from_bytes(bytes(values[first : first + 4]), "little")) for first in (0, 4, 8, 12)]
    text = f"shr.u32 h, {word}, 16;"
    for half, found in ((word, "x"), ("h", "y")):
        text += f"and.b32 t, {half}, 0x7777; shr.u32 m, {half}, 3; and.b32 m, m, 0x1111;"
        text += "mov.b32 z, 0xFF00; prmt.b32 m, z, 0, m;"
        text += f"mov.b32 z, {octets[0]}; prmt.b32 {found}, z, {octets[1]}, t;"
        text += f"mov.b32 z, {octets[2]}; prmt.b32 t, z, {octets[3]}, t; lop3.b32 {found}, {found}, t, m, 0xD8;"
    for part in range(4):
        selector = part * 0x0011 + (part + 4) * 0x1100
        text += f"prmt.b32 t, x, y, {selector:#x}; lop3.b32 a{part}, t, 0x00FF00FF, 0x64006400, 0xEA;"
    return text


@gluon.constexpr_function
def assembly_of(bits, has_high, two_scales, has_offsets, middle):
    """Return the instructions that make the four e4m3 of each of eight parts of four words.

    Operands are the eight results, and of each word: itself, upper bits if there are any, and either a pair of a scale
    and what is added, or scales of the two halves of a word, and perhaps two offsets.
    """
    names = ", ".join(f"q{word}{part}" for word in range(4) for part in range(4))
    text = "{ .reg .b32 w, h, t, m, x, y, z, s, o, a0, a1, a2, a3; .reg .b16 " + names + ";"
    for word in range(4):
        scale = 12 + 4 * has_high + word
        if not two_scales:
            text += f"prmt.b32 s, ${scale}, ${scale}, 0x1010; prmt.b32 o, ${scale}, ${scale}, 0x3232;"
        else:
            text += f"mov.b32 s, ${scale};"
            if has_offsets:
                text += f"mov.b32 o, ${scale + 4};"
            else:  # the middle, negative, is a number of float16
                twice = {68.0: 0xD440, 96.0: 0xD600}[middle] * 0x10001
                text += f"mov.b32 t, {twice:#x}; mul.rn.f16x2 o, s, t;"
        text += _looked_up(bits, f"${8 + word}") if bits >= 8 else _codes(bits, f"${8 + word}", f"${12 + word}")
        for part in range(4):
            text += f"fma.rn.f16x2 a{part}, a{part}, s, o; cvt.rn.satfinite.e4m3x2.f16x2 q{word}{part}, a{part};"
    for part in range(4):
        text += f"mov.b32 x, {{q0{part}, q1{part}}}; mov.b32 y, {{q2{part}, q3{part}}};"
        text += f"prmt.b32 ${part}, x, y, 0x6420; prmt.b32 ${part + 4}, x, y, 0x7531;"
    return text + "}"


@gluon.jit
def spread_runs(own, ROWS: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr):
    """Return what each of the words [rows, 16] has, of what each thread has computed for runs, [rows, 4]."""
    per_run = gl.convert_layout(own, gl.SliceLayout(2, RUNS))
    spread, _ = gl.broadcast(gl.expand_dims(per_run, 2), gl.full([ROWS, 4, 4], 0, gl.int32, layout=RUNS))
    return gl.convert_layout(gl.reshape(spread, [ROWS, 16]), WORDS, assert_trivial=True)


@gluon.jit
def load_stored(
    scale_ptr, added_ptr, super_ptr, row, step, groups, blocks, GROUP: gl.constexpr, NESTED: gl.constexpr,
    OWN: gl.constexpr,
):  # fmt: skip
    """Return scales, offsets or zeros of runs [rows, 4] as they are stored, and scales of scales [rows, 1]."""
    run = gl.expand_dims(step * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, OWN)), 0)
    if GROUP == 16:
        places = row * (groups // 2) + run
    else:
        places = row * groups + gl.minimum(run // (GROUP // 32) if GROUP > 0 else run * 0, groups - 1)
    scale = gl.load(scale_ptr + places)
    added, factor = scale, scale
    if added_ptr is not None:
        added = gl.load(added_ptr + places)
    if NESTED:
        factor = gl.load(super_ptr + row * blocks + step // 2)
    return scale, added, factor


@gluon.jit
def _half(bits):
    return bits.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _pair(low, high):
    """Return words of two numbers in float16."""
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def pairs_of(
    scale, added, factor, power,
    KIND: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSET: gl.constexpr, HAS_ZERO: gl.constexpr,
    NESTED: gl.constexpr, MIDDLE: gl.constexpr,
):  # fmt: skip
    """Return words of a scale and what is added, or of the two scales and the two offsets of a run of 32 channels."""
    by_scale, by_offset = power, power
    if NESTED:
        if HAS_OFFSET:
            by_scale, by_offset = _half(factor) * power, _half(factor >> 16) * -power
        else:
            by_scale = factor.to(gl.float32) * power
    if BITS == 2:
        stored = scale.to(gl.int32)
        first, last = (stored & 15).to(gl.float32) * by_scale, ((stored >> 8) & 15).to(gl.float32) * by_scale
        first_added = ((stored >> 4) & 15).to(gl.float32) * by_offset - MIDDLE * first
        last_added = ((stored >> 12) & 15).to(gl.float32) * by_offset - MIDDLE * last
        both, second = _pair(first, last), _pair(first_added, last_added)
    elif GROUP == 16:
        stored = scale.to(gl.int32)
        first, last = ((stored << 24) >> 24).to(gl.float32) * by_scale, (stored >> 8).to(gl.float32) * by_scale
        both = _pair(first, last)
        second = both
    else:
        if KIND == PAIRS:
            number = (scale << 16).to(gl.float32, bitcast=True) * by_scale
            offset = (scale & -65536).to(gl.float32, bitcast=True) * power
        elif BITS == 9:  # twice the values are looked up, and scales are powers of two
            number = (scale.to(gl.int32) << 23).to(gl.float32, bitcast=True) * by_scale * 0.5
            offset = number
        else:
            number = scale.to(gl.float32) * by_scale
            offset = number
        if KIND == PAIRS:
            sum = offset - MIDDLE * number
        elif HAS_OFFSET:
            sum = added.to(gl.float32) * by_offset - MIDDLE * number
        elif HAS_ZERO:
            sum = (-MIDDLE - added.to(gl.float32)) * number
        else:
            sum = -MIDDLE * number
        both = _pair(number, sum)
        second = both
    return both, second


@gluon.jit
def round_words(
    words, high, both, second,
    BITS: gl.constexpr, HAS_HIGH: gl.constexpr, TWO: gl.constexpr, HAS_OFFSETS: gl.constexpr, MIDDLE: gl.constexpr,
    ROWS: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return the weights of words [rows, 16] as operand [rows, 128], in the order of `Float8Rows`.

    Word t of run g has channel ``32 * g + 4 * p + t`` of a block as its part p: place ``4 * (4 * p + t) + g``.
    """
    TEXT: gl.constexpr = assembly_of(BITS, HAS_HIGH, TWO, HAS_OFFSETS, MIDDLE)
    if HAS_HIGH:
        given = [words, high, both, second] if TWO and HAS_OFFSETS else [words, high, both]
    else:
        given = [words, both, second] if TWO and HAS_OFFSETS else [words, both]
    REGISTERS: gl.constexpr = "=r" + ",=r" * 7 + ",r" * (4 * (2 + HAS_HIGH + (TWO and HAS_OFFSETS)))
    types: gl.constexpr = (gl.float8e4nv,) * 8
    p0, p1, p2, p3, p4, p5, p6, p7 = gl.inline_asm_elementwise(
        TEXT, REGISTERS, given, dtype=types, is_pure=True, pack=4
    )
    even = gl.join(gl.join(p0, p4), gl.join(p2, p6))
    odd = gl.join(gl.join(p1, p5), gl.join(p3, p7))
    places = gl.permute(gl.reshape(gl.join(even, odd), [ROWS, 4, 4, 8]), (0, 3, 2, 1))
    return gl.convert_layout(gl.reshape(places, [ROWS, 128]), OPERAND, assert_trivial=True)
