# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Dot products of words of codes and integers of 16 bits: how the codes of a word become bytes, for each kind.

A GPU multiplies two bytes by two integers of 16 bits and adds them up in one instruction (`dp2a`). So each kind brings
its codes into two registers of four bytes: the even parts of a word, and the odd ones.

- 4 bits: a shift and two ands.
- 5 bits: the even bits of the upper ones are spread by a multiplication. Bits 0, 2, 4 and 6, shifted by 4, 10, 16 and
  22 and added up, are at 4, 12, 20 and 28 among others; where two of the others meet, what they carry ends one bit
  further, which no byte uses.
- 2 and 3 bits: codes that are four bits apart are the selectors of a permutation of the bytes 0 to 3.
- 6 bits: the same with the bytes 0, 16, 32 and 48 for the upper bits, two words at once.
- IQ4: codes choose from a table of 16 bytes, in two halves of eight, between which their last bits choose.
"""

import triton
import triton.language as tl

from mgpu.worker.quantization.packing import NL4

PACK = tl.constexpr("prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $4, $5, 0x5410;")
"""Two pairs of integers of 16 bits."""


def _spread(register: str, source: str, mask: int, shifts: tuple[int, ...], bits: int) -> str:
    """Return how ``bits`` of a register's bytes are set to the bits of ``source`` that ``mask`` leaves."""
    factor = sum(1 << shift for shift in shifts)
    return (
        f"and.b32 c, {source}, {mask:#x}; mul.lo.u32 c, c, {factor:#x}; and.b32 c, c, {bits:#x};"
        f"or.b32 {register}, {register}, c;"
    )


def _table(first: int) -> str:
    """Return four bytes of IQ4's table as a number."""
    return f"{int.from_bytes(bytes(value & 255 for value in NL4[first : first + 4]), 'little'):#x}"


_FOUR = "and.b32 a, WORD, 0x0F0F0F0F; shr.u32 b, WORD, 4; and.b32 b, b, 0x0F0F0F0F;"
_TWO = (
    "and.b32 a, WORD, 0x3333; prmt.b32 a, 0x03020100, 0, a;"
    "shr.u32 b, WORD, 2; and.b32 b, b, 0x3333; prmt.b32 b, 0x03020100, 0, b;"
)
_CODES = {
    "int4": _FOUR,
    "int5": _FOUR
    + _spread("a", "HIGH", 0x55, (4, 10, 16, 22), 0x10101010)
    + _spread("b", "HIGH", 0xAA, (3, 9, 15, 21), 0x10101010),
    "int3": _TWO
    + _spread("a", "HIGH", 0x55, (2, 8, 14, 20), 0x04040404)
    + _spread("b", "HIGH", 0xAA, (1, 7, 13, 19), 0x04040404),
    "int2": _TWO,
    "nl4": "and.b32 c, WORD, 0x77777777;"
    "and.b32 d, WORD, 0x88888888; shr.u32 d, d, 1; or.b32 d, d, 0x32103210;"
    f"prmt.b32 a, {_table(0)}, {_table(4)}, c; prmt.b32 e, {_table(8)}, {_table(12)}, c; prmt.b32 a, a, e, d;"
    "shr.u32 c, c, 16; shr.u32 d, d, 16;"
    f"prmt.b32 b, {_table(0)}, {_table(4)}, c; prmt.b32 e, {_table(8)}, {_table(12)}, c; prmt.b32 e, b, e, d;"
    "prmt.b32 b, a, e, 0x7531; prmt.b32 a, a, e, 0x6420;",
}
"""The parts of WORD, with their upper bits in HIGH, as bytes: even ones in a, odd ones in b."""


def _dot(kind: str) -> str:
    """Return the sum of a word's products: of words $1, upper bits $2, and four pairs from $3 on."""
    signed = "s32.s32" if kind == "nl4" else "s32.u32"
    codes = _CODES[kind].replace("WORD", "$1").replace("HIGH", "$2")
    return (
        f"{{ .reg .b32 a, b, c, d, e, s; {codes} dp2a.lo.{signed} s, $3, a, 0; dp2a.hi.{signed} s, $4, a, s;"
        f"dp2a.lo.{signed} s, $5, b, s; dp2a.hi.{signed} $0, $6, b, s; }}"
    )


def _halves(kind: str) -> str:
    """Return the sums of the first and of the last four parts of a word: of $2, $3, and four pairs from $4 on."""
    codes = _CODES[kind].replace("WORD", "$2").replace("HIGH", "$3")
    return (
        f"{{ .reg .b32 a, b, c, s; {codes} dp2a.lo.s32.u32 s, $4, a, 0; dp2a.lo.s32.u32 $0, $6, b, s;"
        "dp2a.hi.s32.u32 s, $5, a, 0; dp2a.hi.s32.u32 $1, $7, b, s; }"
    )


DOT_4, DOT_5, DOT_NL4 = (tl.constexpr(_dot(kind)) for kind in ("int4", "int5", "nl4"))
DOT_3, DOT_2 = (tl.constexpr(_halves(kind)) for kind in ("int3", "int2"))
DOT_6 = tl.constexpr(
    "{ .reg .b32 a, b, c, d, s;"
    + "".join(
        f"""
    shr.u32 c, $6, {16 * word}; and.b32 c, c, 0x3333; prmt.b32 c, 0x30201000, 0, c;
    shr.u32 d, $6, {16 * word + 2}; and.b32 d, d, 0x3333; prmt.b32 d, 0x30201000, 0, d;
    and.b32 a, ${4 + word}, 0x0F0F0F0F; or.b32 a, a, c;
    shr.u32 b, ${4 + word}, 4; and.b32 b, b, 0x0F0F0F0F; or.b32 b, b, d;
    dp2a.lo.s32.u32 s, ${7 + word}, a, 0; dp2a.lo.s32.u32 ${word}, ${11 + word}, b, s;
    dp2a.hi.s32.u32 s, ${9 + word}, a, 0; dp2a.hi.s32.u32 ${2 + word}, ${13 + word}, b, s;
    """
        for word in range(2)
    )
    + "}"
)
"""As `_halves`, of two words: $4 and $5, their upper bits in $6, and pairs of pairs from $7 on."""


@triton.jit
def _packed(a, b, c, d):
    return tl.inline_asm_elementwise(
        PACK, "=r,=r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _code(words, high, table_ptr, PART: tl.constexpr, KIND: tl.constexpr):
    if KIND >= 7:  # noqa: SIM108 - compile-time condition
        code = (words.to(tl.int32) >> (2 * PART)) & 3
    else:
        code = (words >> (4 * PART)) & 15
    if KIND == 4:
        code = tl.load(table_ptr + code).to(tl.int32)
    elif KIND == 5:
        code |= ((high.to(tl.int32) >> (2 * PART)) & 3) << 4
    elif KIND == 6:
        code |= ((high.to(tl.int32) >> PART) & 1) << 4
    elif KIND == 7:
        code |= ((high.to(tl.int32) >> PART) & 1) << 2
    return code


@triton.jit
def _product(words, high, table_ptr, bits, PART: tl.constexpr, KIND: tl.constexpr):
    return _code(words, high, table_ptr, PART, KIND) * ((bits << 16) >> 16)


@triton.jit
def dot_words(
    words, high, table_ptr, q0, q1, q2, q3, q4, q5, q6, q7,
    KIND: tl.constexpr, GROUP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return the sums of the products of each word's parts and the integers in the lower halves of q0 to q7.

    Of groups of 16 the sums of the first and of the last four parts; else the sum of all, twice.
    """
    if not ASSEMBLY:
        sums = _product(words, high, table_ptr, q0, 0, KIND) + _product(words, high, table_ptr, q1, 1, KIND)
        sums += _product(words, high, table_ptr, q2, 2, KIND) + _product(words, high, table_ptr, q3, 3, KIND)
        last_sums = _product(words, high, table_ptr, q4, 4, KIND) + _product(words, high, table_ptr, q5, 5, KIND)
        last_sums += _product(words, high, table_ptr, q6, 6, KIND) + _product(words, high, table_ptr, q7, 7, KIND)
        if GROUP != 16:
            sums += last_sums
    else:
        first_even, last_even = _packed(q0, q2, q4, q6)
        first_odd, last_odd = _packed(q1, q3, q5, q7)
        if KIND == 5:
            sums, last_sums = tl.inline_asm_elementwise(
                DOT_6, "=r,=r,=r,=r" + ",r" * 11, [words, high, first_even, last_even, first_odd, last_odd],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=2,
            )  # fmt: skip
        elif GROUP == 16:
            sums, last_sums = tl.inline_asm_elementwise(
                DOT_3 if KIND == 7 else DOT_2, "=r,=r" + ",r" * 6,
                [words.to(tl.int32), high.to(tl.int32), first_even, last_even, first_odd, last_odd],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            sums = tl.inline_asm_elementwise(
                DOT_NL4 if KIND == 4 else DOT_5 if KIND == 6 else DOT_4, "=r" + ",r" * 6,
                [words, high.to(tl.int32), first_even, last_even, first_odd, last_odd],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
            last_sums = sums
    if GROUP != 16:
        last_sums = sums
    return sums, last_sums
