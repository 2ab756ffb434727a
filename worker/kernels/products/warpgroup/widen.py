# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Words of eight 4-bit codes as operands of a warpgroup's product, widened where the tensor core reads them.

Part i of the neighbouring words j and j + 1 is a pair of bfloat16, and a thread holds the pairs that one instruction
of the tensor core reads from it. So no weight goes through shared memory after it is widened.

A code stays where it is in its word: in the lowest four bits of a half it is the bfloat16 ``code * 2^-133``, in the
next four ``code * 2^-129``. Both are below the smallest normal number or just above it, where neighbours have the same
distance. One multiplication by ``scale * 2^117`` or ``scale * 2^113`` and one addition make it a weight times 2^-16,
in a single instruction for two weights. What is added, ``(offset - 8 * scale) * 2^-16``, is rounded to bfloat16 as
well, so a weight is off by up to two roundings. Sums are multiplied by `SUM_FACTOR`.

- `PAIRS`, the int4 of ``--quant 4``: scale and offset are a word of two bfloat16.
- `GROUPS`, the int4 of checkpoints: (q - zero) * scale, with a scale of 16 or 32 bits. What rounding the scale to
  bfloat16 changes is made up for in the offset, for the middle code.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

PAIRS, GROUPS = gl.constexpr(0), gl.constexpr(1)


SUM_FACTOR = gl.constexpr(65536.0)
"""Weights are 2^-16 of what they stand for, so that their factors are numbers of bfloat16 for scales below 1024."""


@gluon.constexpr_function
def assembly(byte):
    """Return the instructions that widen the two parts in a byte of two words ($2 and $3)."""
    selector = ("0x7440", "0x7551", "0x7662", "0x7773")[byte]
    return (
        f"{{ .reg .b32 w, a, b; prmt.b32 w, $2, $3, {selector}; and.b32 a, w, 0x000f000f; and.b32 b, w, 0x00f000f0;"
        "fma.rn.bf16x2 $0, a, $4, $8; fma.rn.bf16x2 $1, b, $6, $8; }"
    )


# From a scale and an offset: scale * 2^117, scale * 2^113 and (offset - 8 * scale) * 2^-16, each twice.
PAIR_FACTORS = gl.constexpr(
    "{ .reg .b32 s, o, c, z; mov.b32 z, 0x80008000; prmt.b32 s, $3, $3, 0x1010; prmt.b32 o, $3, $3, 0x3232;"
    "mov.b32 c, 0x7A007A00; fma.rn.bf16x2 $0, s, c, z; mov.b32 c, 0x78007800; fma.rn.bf16x2 $1, s, c, z;"
    "mov.b32 c, 0xC100C100; fma.rn.bf16x2 o, s, c, o; mov.b32 c, 0x37803780; fma.rn.bf16x2 $2, o, c, z; }"
)


def word_layouts(block_n: int, num_warps: int) -> tuple[object, object]:
    """Return the layouts of words [block_n, 32], as the tall operand of a product has them, and as [block_n, 8, 4]."""
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warps = [[16, 0], [32, 0], [64, 0]][: num_warps.bit_length() - 1]
    rest = [[row, 0] for row in (64, 128) if 16 * num_warps <= row < block_n]
    registers = [[0, 1], [8, 0], [0, 8], [0, 16], *rest]

    def by_run(bases: list[list[int]]) -> list[list[int]]:
        return [[row, column // 4, column % 4] for row, column in bases]

    flat = gl.DistributedLinearLayout(registers, lanes, warps, [], [block_n, 32])
    runs = gl.DistributedLinearLayout(by_run(registers), by_run(lanes), by_run(warps), [], [block_n, 8, 4])
    return flat, runs


@gluon.jit
def spread_runs(per_run, ROWS: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr):
    """Return what each of 32 words has, of numbers [ROWS, 8] of runs of four words."""
    spread, _ = gl.broadcast(gl.expand_dims(per_run, 2), gl.full([ROWS, 8, 4], 0, gl.int32, layout=RUNS))
    return gl.convert_layout(gl.reshape(spread, [ROWS, 32]), WORDS, assert_trivial=True)


@gluon.jit
def twice(numbers):
    """Return each number as bfloat16 in both halves of a word."""
    return numbers.to(gl.bfloat16).to(gl.uint16, bitcast=True).to(gl.int32) * 0x10001


@gluon.jit
def load_factors(
    scale_ptr, zero_ptr, first_row, N, groups, block,
    KIND: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Return what the lower and the upper codes of each word's bytes are multiplied by, and what is added."""
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RUNS)))
    run = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, RUNS)))
    group = gl.minimum((block * 256 + run * 32) // GROUP, groups - 1) if GROUP > 0 else run * 0
    places = gl.expand_dims(gl.minimum(rows, N - 1), 1) * groups + gl.expand_dims(group, 0)
    if KIND == PAIRS:
        types: gl.constexpr = (gl.int32, gl.int32, gl.int32)
        low, high, offset = gl.inline_asm_elementwise(
            PAIR_FACTORS, "=r,=r,=r,r", [gl.load(scale_ptr + places)], dtype=types, is_pure=True, pack=1
        )
    else:
        scale = gl.load(scale_ptr + places).to(gl.float32)
        near = scale.to(gl.bfloat16).to(gl.float32)
        added = -8.0 * near
        if zero_ptr is not None:
            added -= gl.load(zero_ptr + places).to(gl.float32) * scale
        low, high = twice(near * 1.661534994731145e35), twice(near * 1.0384593717069655e34)  # 2^117 and 2^113
        offset = twice(added / SUM_FACTOR)
    return (
        spread_runs(low, ROWS, WORDS, RUNS),
        spread_runs(high, ROWS, WORDS, RUNS),
        spread_runs(offset, ROWS, WORDS, RUNS),
    )


@gluon.jit
def widen(words, low_scale, high_scale, offset, BYTE: gl.constexpr, OPERAND: gl.constexpr):
    """Return parts 2 * BYTE and 2 * BYTE + 1 of each word as bfloat16 operands [rows, 32], divided by `SUM_FACTOR`."""
    TEXT: gl.constexpr = assembly(BYTE)
    given = [words, low_scale, high_scale, offset]
    low, high = gl.inline_asm_elementwise(
        TEXT, "=r,=r,r,r,r,r,r,r,r,r", given, dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
    )
    low = gl.convert_layout(low, OPERAND, assert_trivial=True)
    return low, gl.convert_layout(high, OPERAND, assert_trivial=True)
