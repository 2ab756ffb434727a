# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Experts of a few tokens: only the chosen experts' weights are read, straight from memory to registers.

Two kernels, as matrix-vector products of single rows have them (`products/gemv.py`). The first computes gate, up and
the activation of each pair of token and expert. The second multiplies by the rows of `down` of all of a token's experts
at once, so that the weighted sum over experts costs nothing. A network that all tokens share is computed by further
programs of the first kernel, and added in the second: alone it would take three more kernels.
"""

# T tokens, D model dim, A active experts of a token, N experts of this rank, F width of an expert on this rank,
# S width of the shared network on this rank

from dataclasses import dataclass
from typing import NamedTuple

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
    gate_warps: int = 2
    down_rows: int = 1
    down_k: int = 128
    down_warps: int = 1


@dataclass(frozen=True, slots=True)
class SharedNetwork:
    """The network that all tokens go through beside their experts, as one rank has it."""

    gate_up: Tensor
    """[2 S, D]: gate, then up."""
    down: Tensor
    """[D, S]."""
    share_D: Tensor | None = None
    """Its product with a token is the logit of what the token takes of the network's output; None: all."""


class SharedHalf(NamedTuple):
    """The first half of a shared network, for another kernel to compute on its way."""

    network: SharedNetwork
    gate: int
    out_TS: Tensor
    """Where act(gate) * up goes, times what a token takes of it."""


@triton.jit
def _rows_in_turn(part, width, ROWS: tl.constexpr):
    """Return a program's rows of a matrix that stacks gate and up: both in turn; those past the last repeat it."""
    row = part * ROWS + tl.arange(0, ROWS)
    return tl.minimum(row // 2, width - 1) + row % 2 * width


@triton.jit
def _store_gated(sums, h_ptr, part, width, GATE: tl.constexpr, ROWS: tl.constexpr, share):
    gate, up = tl.split(tl.reshape(sums, [ROWS // 2, 2]))
    f = part * (ROWS // 2) + tl.arange(0, ROWS // 2)
    tl.store(h_ptr + f, (gated(gate, up, GATE) * share).to(h_ptr.dtype.element_ty), mask=f < width)


@triton.jit
def _expert_rows(
    x_ptr, w_ptr, h_ptr, expert, F, K, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    part = tl.program_id(0)
    rows_ptr = w_ptr + (expert.to(tl.int64) * 2 * F + _rows_in_turn(part, F, ROWS))[:, None] * K
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + k
        w = tl.load(rows_ptr + ks[None, :], mask=(ks < K)[None, :], other=0.0)
        x = tl.load(x_ptr + ks, mask=ks < K, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    _store_gated(tl.sum(acc, 1), h_ptr, part, F, GATE, ROWS, 1.0)


@triton.jit
def shared_rows(
    x_ptr, w_ptr, share_ptr, h_ptr, part, S, K, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Compute outputs of the first half of the shared network, times a token's share: ROWS / 2 from ``part`` on."""
    rows_ptr = w_ptr + _rows_in_turn(part, S, ROWS).to(tl.int64)[:, None] * K
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    logit = tl.zeros([BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + k
        w = tl.load(rows_ptr + ks[None, :], mask=(ks < K)[None, :], other=0.0)
        x = tl.load(x_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        if share_ptr is not None:
            logit += tl.load(share_ptr + ks, mask=ks < K, other=0.0).to(tl.float32) * x
    share = 1.0
    if share_ptr is not None:
        share = tl.sigmoid(tl.sum(logit, 0))
    _store_gated(tl.sum(acc, 1), h_ptr, part, S, GATE, ROWS, share)


@triton.jit(do_not_specialize=["first_expert", "T", "pieces"])
def _gate_up_kernel(
    x_ptr, w_ptr, experts_ptr, h_ptr, shared_ptr, share_ptr, shared_h_ptr,
    first_expert, T, pieces, N, F, S, K, x_stride,
    A: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    wait_for_inputs(OVERLAP)
    if shared_ptr is not None:
        # The first programs have the shared network, in pieces as wide as an expert.
        part = pair % pieces * tl.num_programs(0) + tl.program_id(0)
        token = (pair // pieces).to(tl.int64)
        if (token < T) & (part * ROWS < 2 * S):
            shared_rows(
                x_ptr + token * x_stride, shared_ptr, share_ptr, shared_h_ptr + token * S, part, S, K, GATE, ROWS,
                BLOCK_K,
            )  # fmt: skip
        pair -= T * pieces
    expert = tl.load(experts_ptr + pair, mask=pair >= 0, other=-1) - first_expert
    if (pair >= 0) & (expert >= 0) & (expert < N):
        token = (pair // A).to(tl.int64)
        _expert_rows(x_ptr + token * x_stride, w_ptr, h_ptr + pair.to(tl.int64) * F, expert, F, K, GATE, ROWS, BLOCK_K)


@triton.jit(do_not_specialize=["first_expert"])
def _down_kernel(
    h_ptr, w_ptr, experts_ptr, weights_ptr, shared_h_ptr, shared_ptr, y_ptr,
    first_expert, N, F, S, D,
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
    if shared_ptr is not None:
        shared_rows_ptr = shared_ptr + tl.minimum(d, D - 1).to(tl.int64)[:, None] * S
        shared = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for k0 in range(0, S, BLOCK_K):
            ks = k0 + k
            w = tl.load(shared_rows_ptr + ks[None, :], mask=(ks < S)[None, :], other=0.0)
            h = tl.load(shared_h_ptr + token * S + ks, mask=ks < S, other=0.0)
            shared += w.to(tl.float32) * h.to(tl.float32)[None, :]
        y += tl.sum(shared, 1)
    tl.store(y_ptr + token.to(tl.int64) * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def few_tokens(
    x_TD: Tensor,
    gate_up_NFD: Tensor,
    down_NDF: Tensor,
    routing: tuple[Tensor, Tensor],
    first_expert: int,
    gate: int,
    tiling: FewTiling = FewTiling(),
    shared: SharedNetwork | None = None,
    shared_TS: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum over each token's experts, and the shared network's output, [T, D].

    Experts of other ranks are left out. ``shared_TS``: what the first half of the shared network has made of the
    tokens, if another kernel has computed it.
    """
    experts_TA, weights_TA = routing
    tokens, dim = x_TD.shape
    count, width, active = len(down_NDF), down_NDF.shape[2], experts_TA.shape[1]
    overlap = overlaps_launches(x_TD.device)
    h = torch.empty(tokens * active, width, dtype=x_TD.dtype, device=x_TD.device)
    shared_width = 0 if shared is None else shared.down.shape[1]
    programs, pieces = ceil_div(2 * width, tiling.gate_rows), 0
    to_compute: tuple[Tensor | None, ...] = (None, None, None)
    if shared is not None and shared_TS is None:
        shared_TS = torch.empty(tokens, shared_width, dtype=x_TD.dtype, device=x_TD.device)
        to_compute, pieces = (shared.gate_up, shared.share_D, shared_TS), ceil_div(shared_width, width)
    _gate_up_kernel[(programs, tokens * (active + pieces))](
        x_TD, gate_up_NFD, experts_TA, h, *to_compute,
        first_expert, tokens, pieces, count, width, shared_width, dim, x_TD.stride(0),
        active, gate, tiling.gate_rows, min(tiling.gate_k, power_of_2(dim)), overlap,
        **launch_options(x_TD.device, tiling.gate_warps, 1),
    )  # fmt: skip
    y_TD = torch.empty(tokens, dim, dtype=x_TD.dtype, device=x_TD.device)
    _down_kernel[(ceil_div(dim, tiling.down_rows), tokens)](
        h, down_NDF, experts_TA, weights_TA, shared_TS, None if shared is None else shared.down, y_TD,
        first_expert, count, width, shared_width, dim,
        active, power_of_2(active), tiling.down_rows, min(tiling.down_k, power_of_2(width)), overlap,
        **launch_options(x_TD.device, tiling.down_warps, 1),
    )  # fmt: skip
    return y_TD
