# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Packed weights to bfloat16 in registers: two elements per instruction, no conversion instruction.

A word is an int32 with four 8-bit or eight 4-bit weights; part i of neighbouring words j and j + 1 becomes one pair of
bfloat16, which is what the tensor core's operand registers hold. Triton's own conversions need 5–9 instructions per
weight where these need 2 (8 bits, exact) or 2.1 (4 bits, scale and offset included); at 4.3 TB/s one SM has to widen 19
int8 or 30 int4 weights per clock with 128 issue slots.
"""

import triton
import triton.language as tl

KINDS = {"int8": 0, "fp8": 1, "int4": 2}
"""The constant KIND of kernels."""

# bfloat16 0x4300 is 128 and its neighbours are 1 apart, so 0x4300 | v is 128 + v for v < 128. With b the top bit,
# int8 = (128 + low 7 bits) - (128 + 128 * b).  fma with -1 is a subtraction that Ampere has too.
_INT8_ASM = tl.constexpr(
    "{ .reg .b32 t, a, b, c; mov.b32 c, 0xBF80BF80;"
    + "".join(
        f"""
    prmt.b32 t, $4, $5, {selector};
    lop3.b32 a, t, 0x007f007f, 0x43004300, 0xEA;
    lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 ${part}, b, c, a;"""
        for part, selector in enumerate(("0x7440", "0x7551", "0x7662", "0x7773"))
    )
    + "}"
)

# e4m3's exponent and mantissa, moved to bfloat16's, are the value times 2^-120, its subnormals included.
_E4M3_ASM = tl.constexpr(
    "{ .reg .b32 t, a, c, z; mov.b32 c, 0x7B807B80; mov.b32 z, 0x80008000;"
    + "".join(
        f"""
    prmt.b32 t, $4, $5, {selector};
    shr.u32 a, t, 4;
    and.b32 a, a, 0x07f007f0;
    lop3.b32 a, t, 0x80008000, a, 0xEA;
    fma.rn.bf16x2 ${part}, a, c, z;"""
        for part, selector in enumerate(("0x4404", "0x5515", "0x6626", "0x7737"))
    )
    + "}"
)

# A nibble holds q + 8: (128 + nibble) - 136 is exact, and q * scale + offset is rounded once.
_INT4_ASM = tl.constexpr(
    "{ .reg .b32 t, a, c, d, scale, offset; mov.b32 c, 0xC308C308; mov.b32 d, 0x3F803F80;"
    "prmt.b32 scale, $10, $11, 0x5410; prmt.b32 offset, $10, $11, 0x7632;"
    + "".join(
        f"""
    prmt.b32 t, $8, $9, {selector};
    lop3.b32 a, t, 0x000f000f, 0x43004300, 0xEA;
    fma.rn.bf16x2 a, a, d, c;
    fma.rn.bf16x2 ${2 * part}, a, scale, offset;
    shr.u32 t, t, 4;
    lop3.b32 a, t, 0x000f000f, 0x43004300, 0xEA;
    fma.rn.bf16x2 a, a, d, c;
    fma.rn.bf16x2 ${2 * part + 1}, a, scale, offset;"""
        for part, selector in enumerate(("0x7440", "0x7551", "0x7662", "0x7773"))
    )
    + "}"
)


@triton.jit
def split_scales(pairs):
    """Return scale and offset (float32) of int4's words of two bfloat16, which are the high halves of floats."""
    return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def split_halves(pairs):
    """Return the two float16 of words, the lower first, as float32."""
    low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _nibble(words, scale, offset, PART: tl.constexpr, DTYPE: tl.constexpr):
    return ((((words >> (4 * PART)) & 0xF) - 8).to(tl.float32) * scale + offset).to(DTYPE)


@triton.jit
def widen_int4(words, pairs, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the eight parts of each word as weights, rounded to DTYPE; ``pairs``: each word's scale and offset."""
    if ASSEMBLY and tl.bfloat16 == DTYPE:
        parts = tl.inline_asm_elementwise(
            _INT4_ASM,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r",
            [words, pairs],
            dtype=(
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
                tl.bfloat16,
            ),
            is_pure=True,
            pack=2,
        )
    else:
        s, o = split_scales(pairs)
        parts = (
            _nibble(words, s, o, 0, DTYPE),
            _nibble(words, s, o, 1, DTYPE),
            _nibble(words, s, o, 2, DTYPE),
            _nibble(words, s, o, 3, DTYPE),
            _nibble(words, s, o, 4, DTYPE),
            _nibble(words, s, o, 5, DTYPE),
            _nibble(words, s, o, 6, DTYPE),
            _nibble(words, s, o, 7, DTYPE),
        )
    return parts


@triton.jit
def _octet(words, PART: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    if KIND == 1:
        # As above, in float32: GPUs before Ada have no conversion. 2^120 is exact, and so is the product.
        bits = ((words << (24 - 8 * PART)) & -0x80000000) | (((words >> (8 * PART)) & 0x7F) << 20)
        value = (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)
    else:
        value = ((words << (24 - 8 * PART)) >> 24).to(DTYPE)
    return value


@triton.jit
def widen_octets(words, KIND: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the four parts of each word (KIND 0: int8, 1: e4m3), lowest bits first, without their scale."""
    if ASSEMBLY and tl.bfloat16 == DTYPE:
        parts = tl.inline_asm_elementwise(
            _E4M3_ASM if KIND == 1 else _INT8_ASM,
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        parts = (
            _octet(words, 0, KIND, DTYPE),
            _octet(words, 1, KIND, DTYPE),
            _octet(words, 2, KIND, DTYPE),
            _octet(words, 3, KIND, DTYPE),
        )
    return parts


# Two e4m3 values per 16-bit lane, in two neighbouring lanes: (even, even) and (odd, odd) as float16 pairs.
_E4M3_PAIRS_ASM = tl.constexpr("""{
    .reg .b16 low, high;
    .reg .b32 a, b;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 a, low;
    cvt.rn.f16x2.e4m3x2 b, high;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
}""")


@triton.jit
def widen_fp8_pairs(pairs, ASSEMBLY: tl.constexpr):
    """Return (even, odd) float16 elements of int16 words that hold two e4m3 values each.

    Words, because operands of 16 bits can be transposed on their way from shared memory and bytes cannot.
    """
    if ASSEMBLY:
        even, odd = tl.inline_asm_elementwise(
            _E4M3_PAIRS_ASM, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return even, odd


# float32 0x4B000000 is 2^23 and its neighbours are 1 apart; the bytes hold q + 128 after the exclusive or.
_INT8_FLOATS_ASM = tl.constexpr("""{
    .reg .b32 t, u;
    xor.b32 t, $4, 0x80808080;
    prmt.b32 u, t, 0x4B000000, 0x7540; sub.f32 $0, u, 0f4B000080;
    prmt.b32 u, t, 0x4B000000, 0x7541; sub.f32 $1, u, 0f4B000080;
    prmt.b32 u, t, 0x4B000000, 0x7542; sub.f32 $2, u, 0f4B000080;
    prmt.b32 u, t, 0x4B000000, 0x7543; sub.f32 $3, u, 0f4B000080;
}""")

_E4M3_FLOATS_ASM = tl.constexpr("""{
    .reg .b16 a, b, h0, h1, h2, h3;
    .reg .b32 low, high;
    mov.b32 {a, b}, $4;
    cvt.rn.f16x2.e4m3x2 low, a;
    cvt.rn.f16x2.e4m3x2 high, b;
    mov.b32 {h0, h1}, low;
    mov.b32 {h2, h3}, high;
    cvt.f32.f16 $0, h0;
    cvt.f32.f16 $1, h1;
    cvt.f32.f16 $2, h2;
    cvt.f32.f16 $3, h3;
}""")

# float32 0x43000000 is 128; bit 16 of its neighbours counts ones.
_INT4_FLOATS_ASM = tl.constexpr("""{
    .reg .b32 low, high;
    and.b32 low, $8, 0x0F0F0F0F;
    shr.u32 high, $8, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, 0x43000000, 0x7044;
    prmt.b32 $1, high, 0x43000000, 0x7044;
    prmt.b32 $2, low, 0x43000000, 0x7144;
    prmt.b32 $3, high, 0x43000000, 0x7144;
    prmt.b32 $4, low, 0x43000000, 0x7244;
    prmt.b32 $5, high, 0x43000000, 0x7244;
    prmt.b32 $6, low, 0x43000000, 0x7344;
    prmt.b32 $7, high, 0x43000000, 0x7344;
}""")

# e2m1's exponent and mantissa, moved to float16's, are the value times 2^-14, its subnormal included. Codes that are
# four apart lie in the two halves of a word.
_FP4_FLOATS_ASM = tl.constexpr(
    "{ .reg .b32 t, u; .reg .b16 h0, h1;"
    + "".join(
        f"""
    {f"shl.b32 t, $8, {12 - 4 * part};" if part < 3 else "mov.b32 t, $8;"}
    {f"shl.b32 u, $8, {9 - 4 * part};" if part < 3 else "shr.u32 u, $8, 3;"}
    and.b32 t, t, 0x80008000;
    lop3.b32 t, u, 0x0E000E00, t, 0xEA;
    mov.b32 {{h0, h1}}, t;
    cvt.f32.f16 ${part}, h0;
    cvt.f32.f16 ${part + 4}, h1;"""
        for part in range(4)
    )
    + "}"
)
FP4_SCALE = tl.constexpr(16384.0)
"""What the results of `widen_fp4_to_floats` lack."""

INT4_BIAS = tl.constexpr(136.0)
"""`widen_to_floats` leaves this added to int4 weights: subtracting it once from a sum is cheaper."""


@triton.jit
def _eight_floats(words, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM,
        "=r,=r,=r,=r,=r,=r,=r,=r,r",
        [words],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def widen_to_floats(words, KIND: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the parts of each word as float32: int8 and e4m3 as they are, int4 with `INT4_BIAS` added."""
    if KIND == 2:
        if ASSEMBLY:
            parts = _eight_floats(words, _INT4_FLOATS_ASM)
        else:
            parts = (
                _nibble(words, 1.0, INT4_BIAS, 0, tl.float32),
                _nibble(words, 1.0, INT4_BIAS, 1, tl.float32),
                _nibble(words, 1.0, INT4_BIAS, 2, tl.float32),
                _nibble(words, 1.0, INT4_BIAS, 3, tl.float32),
                _nibble(words, 1.0, INT4_BIAS, 4, tl.float32),
                _nibble(words, 1.0, INT4_BIAS, 5, tl.float32),
                _nibble(words, 1.0, INT4_BIAS, 6, tl.float32),
                _nibble(words, 1.0, INT4_BIAS, 7, tl.float32),
            )
    elif ASSEMBLY:
        parts = tl.inline_asm_elementwise(
            _E4M3_FLOATS_ASM if KIND == 1 else _INT8_FLOATS_ASM,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        parts = widen_octets(words, KIND, tl.float32, False)
    return parts


@triton.jit
def _e2m1(words, PART: tl.constexpr):
    # Moved to float32's exponent and mantissa, it is the value times 2^-126.
    bits = ((words << (28 - 4 * PART)) & -0x80000000) | (((words >> (4 * PART)) & 0x7) << 22)
    return bits.to(tl.float32, bitcast=True) * 5.192296858534828e33


@triton.jit
def widen_fp4_to_floats(words, ASSEMBLY: tl.constexpr):
    """Return the eight parts of each word of e2m1 as float32, divided by `FP4_SCALE`."""
    if ASSEMBLY:
        parts = _eight_floats(words, _FP4_FLOATS_ASM)
    else:
        parts = (
            _e2m1(words, 0),
            _e2m1(words, 1),
            _e2m1(words, 2),
            _e2m1(words, 3),
            _e2m1(words, 4),
            _e2m1(words, 5),
            _e2m1(words, 6),
            _e2m1(words, 7),
        )
    return parts
