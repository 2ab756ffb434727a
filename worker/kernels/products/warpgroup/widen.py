# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Words of eight 4-bit codes as operands of a warpgroup's product, widened where the tensor core reads them.

Part i of the neighbouring words j and j + 1 is a pair of bfloat16, and a thread holds the pairs that one instruction of
the tensor core reads from it. So no weight goes through shared memory after it is widened.

- `PAIRS`, the int4 of ``--quant 4``: scale and offset in bfloat16. A weight is rounded once: q * scale + offset.
- `GROUPS`, the int4 of checkpoints: (q - zero) * scale, with a scale of 16 or 32 bits. The scale is the sum of two
  bfloat16, and the smaller product is added to the larger one, so that a weight is rounded as from float32 but for one
  in some hundreds, which may be off by its last bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

PAIRS, GROUPS = gl.constexpr(0), gl.constexpr(1)


@gluon.constexpr_function
def assembly(byte, is_pair):
    """Return the instructions that widen the two parts in a byte of two words ($2 and $3)."""
    # bfloat16 0x4300 is 128 and its neighbours are 1 apart. -0.0 is the addend that changes no product.
    if is_pair:
        start = "mov.b32 m, 0xC308C308; prmt.b32 s, $4, $5, 0x5410; prmt.b32 o, $4, $5, 0x7632;"
        each = "fma.rn.bf16x2 a, a, one, m; fma.rn.bf16x2 {0}, a, s, o;"
    else:
        start = "mov.b32 m, $6; mov.b32 o, 0x80008000; prmt.b32 s, $4, $4, 0x1010; prmt.b32 r, $4, $4, 0x3232;"
        each = "fma.rn.bf16x2 a, a, one, m; fma.rn.bf16x2 t, a, r, o; fma.rn.bf16x2 {0}, a, s, t;"
    selector = ("0x7440", "0x7551", "0x7662", "0x7773")[byte]
    nibbles = "lop3.b32 a, w, 0x000f000f, 0x43004300, 0xEA;"
    return (
        "{ .reg .b32 w, a, s, o, m, r, t, one; mov.b32 one, 0x3F803F80;" + start
        + f"prmt.b32 w, $2, $3, {selector};" + nibbles + each.format("$0")
        + "shr.u32 w, w, 4;" + nibbles + each.format("$1") + "}"
    )  # fmt: skip


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
def _of_words(per_run, ROWS: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr):
    """Return what each of 32 words has, of numbers [ROWS, 8] of runs of four words."""
    spread, _ = gl.broadcast(gl.expand_dims(per_run, 2), gl.full([ROWS, 8, 4], 0, gl.int32, layout=RUNS))
    return gl.convert_layout(gl.reshape(spread, [ROWS, 32]), WORDS, assert_trivial=True)


@gluon.jit
def _bits(numbers):
    return numbers.to(gl.bfloat16).to(gl.uint16, bitcast=True).to(gl.int32)


@gluon.jit
def load_factors(
    scale_ptr, zero_ptr, first_row, N, groups, block,
    KIND: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Return two numbers for each word of a block of 256 inputs: a pair, twice; or a scale, and what codes lack."""
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, RUNS)))
    run = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, RUNS)))
    group = gl.minimum((block * 256 + run * 32) // GROUP, groups - 1) if GROUP > 0 else run * 0
    places = gl.expand_dims(gl.minimum(rows, N - 1), 1) * groups + gl.expand_dims(group, 0)
    if KIND == PAIRS:
        pairs = _of_words(gl.load(scale_ptr + places), ROWS, WORDS, RUNS)
        return pairs, pairs
    scale = gl.load(scale_ptr + places).to(gl.float32)
    rest = scale - scale.to(gl.bfloat16).to(gl.float32)
    middle = scale * 0.0 - 136.0
    if zero_ptr is not None:
        middle -= gl.load(zero_ptr + places).to(gl.float32)
    scales = _of_words(_bits(scale) | (_bits(rest) << 16), ROWS, WORDS, RUNS)
    return scales, _of_words(_bits(middle) * 0x10001, ROWS, WORDS, RUNS)


@gluon.jit
def widen(words, factors, middles, BYTE: gl.constexpr, KIND: gl.constexpr, OPERAND: gl.constexpr):
    """Return parts 2 * BYTE and 2 * BYTE + 1 of each word as bfloat16 operands [rows, 32]."""
    TEXT: gl.constexpr = assembly(BYTE, KIND == PAIRS)
    low, high = gl.inline_asm_elementwise(
        TEXT, "=r,=r,r,r,r,r,r,r", [words, factors, middles], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
    )
    low = gl.convert_layout(low, OPERAND, assert_trivial=True)
    return low, gl.convert_layout(high, OPERAND, assert_trivial=True)
