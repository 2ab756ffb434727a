# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What kernels of one decode row share: which rows of the weight a program multiplies by, and what becomes of the sums.

A gated weight stacks gate and up. A program takes rows of both in turn, which are the same loads as of twice as many
plain outputs, and gives act(gate) * up: one kernel less per layer, and nothing rounded in between.
"""

# N outputs

from typing import Literal

import triton
import triton.language as tl

Activation = Literal["silu", "gelu_tanh"]
GATES: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}


@triton.jit
def weight_rows(N, GATE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Give the rows of the weight that this program multiplies by, [BLOCK_N]; those past the last repeat it."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATE > 0:  # noqa: SIM108 - compile-time condition
        row = tl.minimum(row // 2, N - 1) + row % 2 * N
    else:
        row = tl.minimum(row, N - 1)
    return row.to(tl.int64)


@triton.jit
def store_outputs(y, rows, bias_ptr, y_ptr, N, GATE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the bias to the sums [BLOCK_N] of `weight_rows`, apply the gate, store the outputs."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    if GATE > 0:
        gate, up = tl.split(tl.reshape(y, [BLOCK_N // 2, 2]))
        if GATE == 1:
            y = gate / (1.0 + tl.exp(-gate)) * up
        else:
            z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            y = gate / (1.0 + tl.exp(-2.0 * z)) * up
        n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
