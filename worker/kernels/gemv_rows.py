# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What kernels of one decode row share: which rows of the weight a program multiplies by, and what becomes of the sums.

A gated weight stacks gate and up. A program takes rows of both in turn, which are the same loads as of twice as many
plain outputs, and gives act(gate) * up: one kernel less per layer, and nothing rounded in between.

A norm between two products is split over them. The first adds its outputs to the residual, gives the sum times the
norm's weight, and adds up the squares; the second divides its outputs by the root of their mean.
"""

# N outputs, K inputs

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]
GATES: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}
PLACES = 32
"""Sums of squares are kept in so many places, so that programs that end together seldom wait for each other."""
_PLACE_STRIDE = tl.constexpr(16)
"""A cache line of float64, whose sums come out alike in whichever order they are made."""


def new_squares(device: torch.device) -> Tensor:
    """Give the memory of one norm's sum of squares, zeros."""
    return torch.zeros(PLACES * _PLACE_STRIDE.value, dtype=torch.float64, device=device)


@dataclass(frozen=True, slots=True)
class NormBefore:
    """The norm of a product's input, of which the division is left to do.

    ``squares``: what a `NormAfter` has added up; None: the input is normalized. ``clears``: the sum that a later
    product will add to.
    """

    squares: Tensor | None
    clears: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class NormAfter:
    """Where outputs go: onto the residual [1, N], in place; the result is the sum times ``weight_N``."""

    residual_1N: Tensor
    weight_N: Tensor
    squares: Tensor


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
def load_squares(squares_ptr, clears_ptr):
    """Begin to read the sum of squares, which `norm_factor` needs last; the first program clears the other norm's."""
    places = tl.arange(0, 32) * _PLACE_STRIDE
    if clears_ptr is not None:  # noqa: SIM102 - known to the compiler, unlike the other condition
        if tl.program_id(0) == 0:
            tl.store(clears_ptr + places, tl.zeros([32], tl.float64))
    if squares_ptr is not None:  # noqa: SIM108 - compile-time condition
        squares = tl.load(squares_ptr + places)
    else:
        squares = tl.zeros([32], tl.float64)
    return squares


@triton.jit
def norm_factor(squares, squares_ptr, K, eps):
    """Give what the sums are to be multiplied by."""
    factor = 1.0
    if squares_ptr is not None:
        factor = tl.rsqrt((tl.sum(squares, 0) / K).to(tl.float32) + eps)
    return factor


@triton.jit
def _onto_residual(y, n, mask, residual_ptr, weight_ptr, squares_ptr, DTYPE: tl.constexpr):
    total = tl.load(residual_ptr + n, mask=mask, other=0.0).to(tl.float32)
    # Rounded as it is when the sum is a kernel's own.
    total = (total + y.to(DTYPE).to(tl.float32)).to(DTYPE)
    tl.store(residual_ptr + n, total, mask=mask)
    total = total.to(tl.float32)
    place = tl.program_id(0) % 32 * _PLACE_STRIDE
    tl.atomic_add(squares_ptr + place, tl.sum(total * total, 0).to(tl.float64), sem="relaxed")
    return total * tl.load(weight_ptr + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_outputs(
    y, rows, bias_ptr, residual_ptr, weight_ptr, squares_ptr, y_ptr, N, GATE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Add the bias to the sums [BLOCK_N] of `weight_rows`, apply the gate, add to the residual, store the outputs."""
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
    if residual_ptr is not None:
        y = _onto_residual(y, n, n < N, residual_ptr, weight_ptr, squares_ptr, y_ptr.dtype.element_ty)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
