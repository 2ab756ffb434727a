# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Words of eight codes of 4 bits as operands of float8 products by warpgroups: no code is converted.

The four bits of a code, as a byte, are the e4m3 number ``code * 2^-9``: below 8 a subnormal number, from 8 on one of
the first binade, where neighbours have the same distance. So a word becomes eight operands of the tensor core by one
shift and two ands. A span is the part of a row with one scale that one product has: 32, 64 or 128 channels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STEP = 128
"""Channels of a step."""
X_TILES = gl.NVMMASharedLayout(128, 8, rank=2)
"""How activations lie in shared memory."""
CODE_FACTOR = gl.constexpr(512.0)
"""A code is read as its 512th."""
LOW_CODES = gl.constexpr("{ and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F; }")
"""The codes in the lower and in the upper halves of a word's bytes, a byte each."""


def byte_layout(block_n: int, num_warps: int) -> object:
    """Return the layout of a step's bytes [block_n, 64] in which a thread has words as the tensor core reads them."""
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    warps = [[16, 0], [32, 0], [64, 0]][: num_warps.bit_length() - 1]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]], lanes, warps, [], [block_n, 64])


def scale_layout(block_n: int, num_warps: int, spans: int) -> object:
    """Return the layout of scales [block_n, spans]: a thread has those of the two rows of its sums."""
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    warps = [[16, 0], [32, 0], [64, 0]][: num_warps.bit_length() - 1]
    columns = [[0, 1 << bit] for bit in range(spans.bit_length() - 1)]
    return gl.DistributedLinearLayout([*columns, [8, 0]], lanes, warps, [], [block_n, spans])


@gluon.jit
def codes_of(step_bytes, ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Return the codes of bytes [rows, 64] as operand [rows, 128]: of each run of four words the lower ones first."""
    types: gl.constexpr = (gl.float8e4nv, gl.float8e4nv)
    low, high = gl.inline_asm_elementwise(LOW_CODES, "=r,=r,r", [step_bytes], dtype=types, is_pure=True, pack=4)
    both = gl.permute(gl.reshape(gl.join(low, high), [ROWS, 4, 16, 2]), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(both, [ROWS, 128]), OPERAND, assert_trivial=True)


@gluon.jit
def halves(codes, ROWS: gl.constexpr, WIDTH: gl.constexpr, OPERAND: gl.constexpr):
    """Return the first and the second half of an operand's columns."""
    first, last = gl.split(gl.permute(gl.reshape(codes, [ROWS, 2, WIDTH // 2]), (0, 2, 1)))
    first = gl.convert_layout(first, OPERAND, assert_trivial=True)
    return first, gl.convert_layout(last, OPERAND, assert_trivial=True)
