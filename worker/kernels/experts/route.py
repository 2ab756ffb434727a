# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Choose the experts of a few tokens, in one kernel: a program scores one expert, the last of a token chooses.

Meanwhile further programs compute the first half of the network that all tokens share: it waits for no choice.

`route_and_sort.py` has what more tokens take.
"""

# T tokens, E experts, A active experts of a token, K model dim

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.experts.few import FewTiling, SharedHalf, shared_rows
from mgpu.worker.kernels.runtime import (
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
    wait_for_inputs,
)


@triton.jit
def _ordered(bits):
    """Return integers in the order of the floats with these bits, or for such integers the bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def best_of(scores, e, A: tl.constexpr, A_PAD: tl.constexpr, NORMALIZES: tl.constexpr):
    """Return the A best of one token's scores [E], and their weights, best first, both [A_PAD].

    The first of equal scores wins. Weights are softmax probabilities, or with NORMALIZES those of the chosen alone.
    """
    a = tl.arange(0, A_PAD)
    peak = tl.max(scores, 0)
    total = tl.sum(tl.exp(scores - peak), 0)
    experts = tl.zeros([A_PAD], tl.int32)
    found = tl.zeros([A_PAD], tl.int32)
    # A warp reduces integers in one instruction, floats in five. Both zeros are equal.
    keys = _ordered(tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True))
    for rank in tl.static_range(A):
        best = tl.max(keys, 0)
        chosen = tl.min(tl.where(keys == best, e, scores.shape[0]), 0)
        keys = tl.where(e == chosen, -2147483648, keys)  # below -inf
        experts = tl.where(a == rank, chosen, experts)
        found = tl.where(a == rank, best, found)
    weights = tl.where(a < A, tl.exp(_ordered(found).to(tl.float32, bitcast=True) - peak), 0.0)
    if NORMALIZES:
        total = tl.sum(weights, 0)
    return experts, weights / total


@triton.jit
def _few_kernel(
    x_ptr, w_ptr, bias_ptr, experts_ptr, weights_ptr, scores_ptr, counter_ptr, shared_ptr, share_ptr, shared_h_ptr,
    K, E, S, x_stride, w_stride,
    A: tl.constexpr, A_PAD: tl.constexpr, E_PAD: tl.constexpr, NORMALIZES: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, SHARED_K: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    token = tl.program_id(1)
    if shared_ptr is not None and expert >= E:
        wait_for_inputs(OVERLAP)
        x_ptr += token.to(tl.int64) * x_stride
        shared_h_ptr += token.to(tl.int64) * S
        shared_rows(x_ptr, shared_ptr, share_ptr, shared_h_ptr, expert - E, S, K, GATE, ROWS, SHARED_K)
        return
    k = tl.arange(0, BLOCK_K)
    w_ptr += expert * w_stride
    w = tl.load(w_ptr + k, mask=k < K, other=0.0)  # weights depend on no kernel
    wait_for_inputs(OVERLAP)
    x_ptr += token.to(tl.int64) * x_stride
    acc = w.to(tl.float32) * tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    for first in range(BLOCK_K, K, BLOCK_K):
        ks = first + k
        w = tl.load(w_ptr + ks, mask=ks < K, other=0.0)
        acc += w.to(tl.float32) * tl.load(x_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
    score = tl.sum(acc, 0)
    if bias_ptr is not None:
        score += tl.load(bias_ptr + expert).to(tl.float32)
    scores_ptr += token * E_PAD
    tl.store(scores_ptr + expert, score)
    tl.debug_barrier()  # all threads' stores precede the release below
    if tl.atomic_add(counter_ptr + token, 1, sem="acq_rel") == E - 1:
        e = tl.arange(0, E_PAD)
        scores = tl.load(scores_ptr + e, mask=e < E, other=float("-inf"), cache_modifier=".cg")
        experts, weights = best_of(scores, e, A, A_PAD, NORMALIZES)
        a = tl.arange(0, A_PAD)
        tl.store(experts_ptr + token * A + a, experts, mask=a < A)
        tl.store(weights_ptr + token * A + a, weights, mask=a < A)
        tl.store(counter_ptr + token, 0)


def route_few(
    x_TK: Tensor,
    w_EK: Tensor,
    active: int,
    normalizes: bool,
    bias_E: Tensor | None = None,
    half: SharedHalf | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the experts int32 [T, A] of each token, best first, and their weights float32 [T, A].

    With ``half`` also compute the first half of the shared network.
    """
    tokens, k = x_TK.shape
    count, device = len(w_EK), x_TK.device
    experts = torch.empty(tokens, active, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, active, dtype=torch.float32, device=device)
    workspace = default_workspace(device)
    workspace.require(tokens * power_of_2(count), tokens)
    tiling, parts, width, gate = FewTiling(), 0, 0, 0
    to_compute: tuple[Tensor | None, ...] = (None, None, None)
    if half is not None:
        width, gate = half.out_TS.shape[1], half.gate
        parts = ceil_div(2 * width, tiling.gate_rows)
        to_compute = half.network.gate_up, half.network.share_D, half.out_TS
    _few_kernel[(count + parts, tokens)](
        x_TK, w_EK, bias_E, experts, weights, workspace.partials, workspace.counters, *to_compute,
        k, count, width, x_TK.stride(0), w_EK.stride(0),
        active, power_of_2(active), power_of_2(count), normalizes, gate,
        tiling.gate_rows, min(tiling.gate_k, power_of_2(k)), min(2048, power_of_2(k)), overlaps_launches(device),
        **launch_options(device, 1, 1),
    )  # fmt: skip
    return experts, weights
