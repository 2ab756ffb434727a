# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Experts of a few tokens: only the chosen experts' weights are read, straight from memory to registers.

Two kernels, as matrix-vector products of single rows have them (`products/gemv.py`). The first computes gate, up and
the activation of each pair of token and expert. The second multiplies by the rows of `down` of all of a token's experts
at once, so that the weighted sum over experts costs nothing.
"""

# T tokens, D model dim, A active experts of a token, N experts of this rank, F width of an expert on this rank

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.experts.gate import gated
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs


@dataclass(frozen=True, slots=True)
class FewTiling:
    """Rows of the weight and inputs that a program of each kernel takes at once (see docs/kernels.md)."""

    gate_rows: int = 4
    """Even: gate and up in turn."""
    gate_k: int = 1024
    gate_warps: int = 1
    down_rows: int = 1
    down_k: int = 256
    down_warps: int = 2


@triton.jit(do_not_specialize=["first_expert"])
def _gate_up_kernel(
    x_ptr, w_ptr, experts_ptr, h_ptr,
    first_expert, N, F, K, x_stride,
    A: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row // 2, F - 1) + row % 2 * F
    k = tl.arange(0, BLOCK_K)
    wait_for_inputs(OVERLAP)
    expert = tl.load(experts_ptr + pair) - first_expert
    if (expert < 0) | (expert >= N):
        return
    rows_ptr = w_ptr + (expert.to(tl.int64) * 2 * F + row)[:, None] * K
    x_ptr += (pair // A).to(tl.int64) * x_stride
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + k
        w = tl.load(rows_ptr + ks[None, :], mask=(ks < K)[None, :], other=0.0)
        x = tl.load(x_ptr + ks, mask=ks < K, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(tl.sum(acc, 1), [ROWS // 2, 2]))
    f = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    tl.store(h_ptr + pair.to(tl.int64) * F + f, gated(gate, up, GATE).to(h_ptr.dtype.element_ty), mask=f < F)


@triton.jit(do_not_specialize=["first_expert"])
def _down_kernel(
    h_ptr, w_ptr, experts_ptr, weights_ptr, y_ptr,
    first_expert, N, F, D,
    A: tl.constexpr, A_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    i = tl.arange(0, ROWS * A_PAD)
    a = i % A_PAD
    d = tl.program_id(0) * ROWS + i // A_PAD
    k = tl.arange(0, BLOCK_K)
    wait_for_inputs(OVERLAP)
    pair = token * A + a
    expert = tl.load(experts_ptr + pair, mask=a < A, other=-1) - first_expert
    is_here = (a < A) & (expert >= 0) & (expert < N)
    weight = tl.load(weights_ptr + pair, mask=is_here, other=0.0)
    rows_ptr = w_ptr + (expert.to(tl.int64) * D + tl.minimum(d, D - 1))[:, None] * F
    acc = tl.zeros([ROWS * A_PAD, BLOCK_K], tl.float32)
    for k0 in range(0, F, BLOCK_K):
        ks = k0 + k
        mask = is_here[:, None] & (ks < F)[None, :]
        w = tl.load(rows_ptr + ks[None, :], mask=mask, other=0.0)
        h = tl.load(h_ptr + pair[:, None] * F + ks[None, :], mask=mask, other=0.0)
        acc += w.to(tl.float32) * h.to(tl.float32)
    y = tl.sum(tl.reshape(tl.sum(acc, 1) * weight, [ROWS, A_PAD]), 1)
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y_ptr + token.to(tl.int64) * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def few_tokens(
    x_TD: Tensor,
    gate_up_NFD: Tensor,
    down_NDF: Tensor,
    routing: tuple[Tensor, Tensor],
    first_expert: int,
    gate: int,
    tiling: FewTiling = FewTiling(),
) -> Tensor:
    """Return the weighted sum over each token's experts, [T, D]; experts of other ranks are left out."""
    experts_TA, weights_TA = routing
    tokens, dim = x_TD.shape
    count, width, active = len(down_NDF), down_NDF.shape[2], experts_TA.shape[1]
    overlap = overlaps_launches(x_TD.device)
    h = torch.empty(tokens * active, width, dtype=x_TD.dtype, device=x_TD.device)
    _gate_up_kernel[(ceil_div(2 * width, tiling.gate_rows), tokens * active)](
        x_TD, gate_up_NFD, experts_TA, h,
        first_expert, count, width, dim, x_TD.stride(0),
        active, gate, tiling.gate_rows, min(tiling.gate_k, power_of_2(dim)), overlap,
        **launch_options(x_TD.device, tiling.gate_warps, 1),
    )  # fmt: skip
    y_TD = torch.empty(tokens, dim, dtype=x_TD.dtype, device=x_TD.device)
    _down_kernel[(ceil_div(dim, tiling.down_rows), tokens)](
        h, down_NDF, experts_TA, weights_TA, y_TD,
        first_expert, count, width, dim,
        active, power_of_2(active), tiling.down_rows, min(tiling.down_k, power_of_2(width)), overlap,
        **launch_options(x_TD.device, tiling.down_warps, 1),
    )  # fmt: skip
    return y_TD
