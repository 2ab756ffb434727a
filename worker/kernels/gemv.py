# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix-vector products of a single decode row, with what surrounds them folded in.

y = act(W @ normalize(x)) + residual. One row leaves the tensor cores idle whatever one does, so the weights go straight
from memory to registers: no shared memory, no barrier until the final sum, many loads in flight. The first loads are
issued before the wait for the previous kernel, since weights depend on none.
"""

# N output channels, K input channels

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

Activation = Literal["silu", "gelu_tanh"]
_GATES: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True, slots=True)
class GemvTiling:
    """How a product is cut: see `choose_tiling`."""

    block_n: int
    block_k: int
    num_warps: int
    ahead: bool = True
    """Load the next step's weights before multiplying this one's."""


@triton.jit
def _load_weights(w_ptr, rows, ks, K, k_end, EVEN_K: tl.constexpr, CHECKED: tl.constexpr):
    ptrs = w_ptr + rows[:, None] * K + ks[None, :]
    if CHECKED or not EVEN_K:  # noqa: SIM108 - compile-time condition
        w = tl.load(ptrs, mask=ks[None, :] < k_end, other=0.0)
    else:
        w = tl.load(ptrs)
    return w


@triton.jit
def _gemv_kernel(
    x_ptr,
    w_ptr,
    gain_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    N,
    K,
    eps,
    GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    w = _load_weights(w_ptr, rows, k, K, K, EVEN_K, False)
    if GATE > 0:
        up_ptr = w_ptr + N.to(tl.int64) * K
        up = _load_weights(up_ptr, rows, k, K, K, EVEN_K, False)
    wait_for_inputs(OVERLAP)

    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + k
        if AHEAD:
            next_w = _load_weights(w_ptr, rows, ks + BLOCK_K, K, K, EVEN_K, True)
            if GATE > 0:
                next_up = _load_weights(up_ptr, rows, ks + BLOCK_K, K, K, EVEN_K, True)
        elif k0 > 0:
            w = _load_weights(w_ptr, rows, ks, K, K, EVEN_K, False)
            if GATE > 0:
                up = _load_weights(up_ptr, rows, ks, K, K, EVEN_K, False)
        if EVEN_K:  # noqa: SIM108 - compile-time condition
            x = tl.load(x_ptr + ks).to(tl.float32)
        else:
            x = tl.load(x_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
        if gain_ptr is not None:
            squares += x * x
            if EVEN_K:
                x *= tl.load(gain_ptr + ks).to(tl.float32)
            else:
                x *= tl.load(gain_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        if GATE > 0:
            up_acc += up.to(tl.float32) * x[None, :]
        if AHEAD:
            w = next_w
            if GATE > 0:
                up = next_up

    y = tl.sum(acc, 1)
    up_y = tl.sum(up_acc, 1)
    if gain_ptr is not None:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y *= factor
        up_y *= factor
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)
        if GATE > 0:
            up_y += tl.load(bias_ptr + N + rows).to(tl.float32)
    if GATE == 1:
        y = y / (1.0 + tl.exp(-y)) * up_y
    elif GATE == 2:
        z = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-2.0 * z)) * up_y
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def choose_tiling(n: int, k: int, normalized: bool, gated: bool) -> GemvTiling:
    """Pick tiles (see docs/kernels.md). A step is 8 inputs per thread, so that x has the layout of the weights."""
    if gated:
        return GemvTiling(2, 1024, 2, False)
    if normalized:
        return GemvTiling(8, 512, 2, False)
    if n > k and k % 2048 == 0:
        return GemvTiling(2, 2048, 4, False)
    return GemvTiling(2, 1024, 1, False)


def gemv(
    x_1K: Tensor,
    w_NK: Tensor,
    *,
    gain_K: Tensor | None = None,
    eps: float = 0.0,
    gate: Activation | None = None,
    bias_N: Tensor | None = None,
    residual_1N: Tensor | None = None,
    out_1N: Tensor | None = None,
    tiling: GemvTiling | None = None,
) -> Tensor:
    """Multiply one row by w^T in float32, as a contiguous weight [N, K] is read once.

    ``gain_K``: x is normalized first, as by `rms_norm` with this weight and ``eps`` (without rounding in between).
    ``gate``: the weight stacks gate and up; the result is act(gate) * up, half as wide. ``residual_1N`` is added to the
    result; it may be ``out_1N``. ``bias_N`` is added before the gate.
    """
    k = x_1K.shape[-1]
    n = w_NK.shape[0] // (2 if gate else 1)
    tiling = tiling or choose_tiling(n, k, gain_K is not None, gate is not None)
    if out_1N is None:
        out_1N = torch.empty(1, n, dtype=x_1K.dtype, device=x_1K.device)
    block_k = min(tiling.block_k, power_of_2(k))
    _gemv_kernel[(ceil_div(n, tiling.block_n),)](
        x_1K,
        w_NK,
        gain_K,
        bias_N,
        residual_1N,
        out_1N,
        n,
        k,
        eps,
        _GATES[gate],
        tiling.block_n,
        block_k,
        k % block_k == 0,
        tiling.ahead,
        overlaps_launches(x_1K.device),
        **launch_options(x_1K.device, tiling.num_warps, 1),
    )
    return out_1N
