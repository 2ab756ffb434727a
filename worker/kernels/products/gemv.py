# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix-vector products of a single decode row.

One row leaves the tensor cores idle in any case, so the weights go straight from memory to registers: no shared
memory, no barrier until the final sum, many loads in flight. The first loads are issued before the wait for the
previous kernel, since weights depend on none.

A gated weight stacks gate and up. A program takes rows of both in turn, which are the same loads as of twice as many
plain outputs, and stores act(gate) * up: one kernel less per layer, and nothing rounded in between.
"""

# N output channels, K input channels

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

_FEW_OUTPUTS = 2048
"""Up to so many, programs of one warp leave the memory idle."""
_MANY_OUTPUTS = 4096
"""From so many, programs of four rows are enough of them."""
GATES: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True, slots=True)
class GemvTiling:
    """How a product is cut: see `choose_tiling`."""

    block_n: int
    """Rows of the weight per program; even where it is gated."""
    block_k: int
    num_warps: int


@triton.jit
def weight_rows(N, GATE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the rows of the weight that this program multiplies by, [BLOCK_N]; those past the last repeat it."""
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


@triton.jit
def load_weights(w_ptr, rows, ks, K, EVEN_K: tl.constexpr):
    """Load columns ``ks`` of these rows of the weight."""
    ptrs = w_ptr + rows[:, None] * K + ks[None, :]
    if not EVEN_K:  # noqa: SIM108 - compile-time condition
        w = tl.load(ptrs, mask=ks[None, :] < K, other=0.0)
    else:
        w = tl.load(ptrs)
    return w


@triton.jit
def multiply_rows(
    w, x_ptr, w_ptr, rows, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Return the products of x and these rows of the weight, of which ``w`` has the first ``BLOCK_K`` columns."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + k
        if k0 > 0:
            w = load_weights(w_ptr, rows, ks, K, EVEN_K)
        if EVEN_K:  # noqa: SIM108 - compile-time condition
            x = tl.load(x_ptr + ks).to(tl.float32)
        else:
            x = tl.load(x_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _gemv_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, K,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    rows = weight_rows(N, GATE, BLOCK_N)
    w = load_weights(w_ptr, rows, tl.arange(0, BLOCK_K), K, EVEN_K)
    wait_for_inputs(OVERLAP)
    y = multiply_rows(w, x_ptr, w_ptr, rows, K, BLOCK_N, BLOCK_K, EVEN_K)
    store_outputs(y, rows, bias_ptr, y_ptr, N, GATE, BLOCK_N)


def choose_tiling(n: int, k: int, gated: bool) -> GemvTiling:
    """Pick tiles (see docs/kernels.md). A step is 8 inputs per thread, so that x has the layout of the weights."""
    if gated:
        return GemvTiling(2, 1024, 1)
    if k % 2048:
        return GemvTiling(4 if n >= _MANY_OUTPUTS else 2, 1024, 1)
    if n > k:
        return GemvTiling(2, 2048, 4) if k > 2048 else GemvTiling(4, 1024, 2)
    if n <= _FEW_OUTPUTS:
        return GemvTiling(2, 2048, 2)
    return GemvTiling(2, 4096, 4) if n < k and k % 4096 == 0 else GemvTiling(2, 1024, 1)


def gemv(
    x_1K: Tensor,
    w_NK: Tensor,
    *,
    gate: Activation | None = None,
    bias_N: Tensor | None = None,
    tiling: GemvTiling | None = None,
) -> Tensor:
    """Multiply one row by w^T in float32, as a contiguous weight [N, K] is read once.

    ``gate``: the weight stacks gate and up, [2 N, K]; the result is act(gate) * up. ``bias_N`` is added before that.
    """
    k = x_1K.shape[-1]
    n = w_NK.shape[0] // (2 if gate else 1)
    tiling = tiling or choose_tiling(n, k, gate is not None)
    out_1N = torch.empty(1, n, dtype=x_1K.dtype, device=x_1K.device)
    block_k = min(tiling.block_k, power_of_2(k))
    _gemv_kernel[(ceil_div(w_NK.shape[0], tiling.block_n),)](
        x_1K, w_NK, bias_N, out_1N, n, k,
        GATES[gate], tiling.block_n, block_k, k % block_k == 0, overlaps_launches(x_1K.device),
        **launch_options(x_1K.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_1N
