# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Choose each token's experts: the router's product, and the best of its scores, in one kernel.

Few tokens leave most of the GPU idle, so K is split over programs. The last program of a tile of tokens adds the
partial scores in split order, so that the choice does not depend on which program that was.
"""

# T tokens, E experts, A active experts of a token, K model dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import (
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
    wait_for_inputs,
)

FEW_TOKENS = 512
"""Up to so many tokens K is split."""


@triton.jit
def best_experts(scores, e, A: tl.constexpr, A_PAD: tl.constexpr, BLOCK_T: tl.constexpr, NORMALIZES: tl.constexpr):
    """Return the A best of the scores [BLOCK_T, E], and their weights, best first, both [BLOCK_T, A_PAD].

    The first of equal scores wins. Weights are softmax probabilities, or with NORMALIZES those of the chosen alone.
    """
    a = tl.arange(0, A_PAD)
    peak = tl.max(scores, 1)
    total = tl.sum(tl.exp(scores - peak[:, None]), 1)
    experts = tl.zeros([BLOCK_T, A_PAD], tl.int32)
    weights = tl.zeros([BLOCK_T, A_PAD], tl.float32)
    for rank in tl.static_range(A):
        best = tl.max(scores, 1)
        chosen = tl.min(tl.where(scores == best[:, None], e[None, :], scores.shape[1]), 1)
        scores = tl.where(e[None, :] == chosen[:, None], float("-inf"), scores)
        experts = tl.where(a[None, :] == rank, chosen[:, None], experts)
        weights = tl.where(a[None, :] == rank, tl.exp(best - peak)[:, None], weights)
    if NORMALIZES:
        total = tl.sum(weights, 1)
    return experts, weights / total[:, None]


@triton.jit
def _load_rows(ptr, rows, k, is_row, K, stride):
    offsets = rows[:, None].to(tl.int64) * stride + k[None, :]
    return tl.load(ptr + offsets, mask=is_row[:, None] & (k < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    x_ptr, w_ptr, bias_ptr, experts_ptr, weights_ptr, partial_ptr, counter_ptr,
    T, K, E, x_stride, w_stride,
    A: tl.constexpr, A_PAD: tl.constexpr, E_PAD: tl.constexpr, NORMALIZES: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    k = tl.arange(0, BLOCK_K)
    scores = tl.zeros([BLOCK_T, E_PAD], tl.float32)
    if SPLITS > 1:  # a program has one stretch of K
        k += split * BLOCK_K
        w = _load_rows(w_ptr, e, k, e < E, K, w_stride)  # weights depend on no kernel
        wait_for_inputs(OVERLAP)
        x = _load_rows(x_ptr, t, k, t < T, K, x_stride)
        scores = tl.dot(x, tl.trans(w), scores, input_precision="ieee")
    else:
        wait_for_inputs(OVERLAP)
        for first in range(0, K, BLOCK_K):
            w = _load_rows(w_ptr, e, first + k, e < E, K, w_stride)
            x = _load_rows(x_ptr, t, first + k, t < T, K, x_stride)
            scores = tl.dot(x, tl.trans(w), scores, input_precision="ieee")
    is_last = True
    if SPLITS > 1:
        offsets = t[:, None] * (SPLITS * E_PAD) + e[None, :]
        rows = (t < T)[:, None]
        tl.store(partial_ptr + offsets + split * E_PAD, scores, mask=rows)
        tl.debug_barrier()  # all threads' stores precede the release below
        is_last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            scores = tl.load(partial_ptr + offsets, mask=rows, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                scores += tl.load(partial_ptr + offsets + other * E_PAD, mask=rows, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr + tile, 0)
    if is_last:
        if bias_ptr is not None:
            scores += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        scores = tl.where((e < E)[None, :], scores, float("-inf"))
        experts, weights = best_experts(scores, e, A, A_PAD, BLOCK_T, NORMALIZES)
        a = tl.arange(0, A_PAD)
        places = t[:, None] * A + a[None, :]
        mask = (t < T)[:, None] & (a < A)[None, :]
        tl.store(experts_ptr + places, experts, mask=mask)
        tl.store(weights_ptr + places, weights, mask=mask)


def route(
    x_TK: Tensor, w_EK: Tensor, active: int, normalizes: bool, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the experts int32 [T, A] of each token, best first, and their weights float32 [T, A]."""
    tokens, k = x_TK.shape
    count, device = len(w_EK), x_TK.device
    experts = torch.empty(tokens, active, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, active, dtype=torch.float32, device=device)
    experts_pad = max(16, power_of_2(count))
    workspace = default_workspace(device)
    block_k = min(128, max(16, power_of_2(k)))
    splits = ceil_div(k, block_k)
    # Few tokens: every stretch of K is a program's, as far as the scratch holds the partial scores.
    is_few = tokens <= FEW_TOKENS and tokens * splits * experts_pad <= workspace.partials.numel()
    block_t = 16
    if not is_few:
        splits, block_k = 1, min(64, block_k)
        block_t = 64 if experts_pad <= 128 and x_TK.dtype != torch.float32 else 16
    tiles = ceil_div(tokens, block_t)
    workspace.require(0, tiles)
    _route_kernel[(tiles, splits)](
        x_TK, w_EK, bias_E, experts, weights, workspace.partials, workspace.counters,
        tokens, k, count, x_TK.stride(0), w_EK.stride(0),
        active, power_of_2(active), experts_pad, normalizes,
        splits, block_t, block_k, overlaps_launches(device),
        **launch_options(device, 4, 1 if is_few else 3),
    )  # fmt: skip
    return experts, weights
