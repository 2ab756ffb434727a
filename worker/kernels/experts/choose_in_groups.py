# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Choose experts as routers of DeepSeek's kind do: from the best groups, by scores that are corrected for the choice.

One program has one token. Torch takes about ten kernels for it, each longer than this one.
"""

# T tokens, E experts, A active experts of a token

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.expert_facts import ExpertChoice
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, power_of_2, wait_for_inputs

MOST_GROUPS = 16
"""The loops over groups are unrolled."""
_LEAST = 1e-20
"""Keeps a sum of scores above zero."""


@triton.jit
def _in_best_groups(
    ranked, e, group_size, E_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr, KEPT: tl.constexpr,
    BEST: tl.constexpr,
):  # fmt: skip
    """Return the scores of experts in the best groups, and minus infinity for the others."""
    group, g = e // group_size, tl.arange(0, GROUPS_PAD)
    of_groups = tl.full([GROUPS_PAD], float("-inf"), tl.float32)
    for index in tl.static_range(GROUPS):
        inside = tl.where(group == index, ranked, float("-inf"))
        total = 0.0
        for _ in tl.static_range(BEST):
            top = tl.max(inside, 0)
            total += top
            inside = tl.where(e == tl.min(tl.where(inside == top, e, E_PAD), 0), float("-inf"), inside)
        of_groups = tl.where(g == index, total, of_groups)
    is_in = e < 0
    for _ in tl.static_range(KEPT):
        best = tl.min(tl.where(of_groups == tl.max(of_groups, 0), g, GROUPS_PAD), 0)
        of_groups = tl.where(g == best, float("-inf"), of_groups)
        is_in = is_in | (group == best)
    return tl.where(is_in, ranked, float("-inf"))


@triton.jit
def _choose_kernel(
    logits_ptr, correction_ptr, experts_ptr, weights_ptr, E, logits_stride, group_size, scale, least,
    A: tl.constexpr, A_PAD: tl.constexpr, E_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E_PAD)
    a = tl.arange(0, A_PAD)
    wait_for_inputs(OVERLAP)
    logits = tl.load(logits_ptr + token * logits_stride + e, mask=e < E, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    ranked = scores
    if correction_ptr is not None:
        ranked += tl.load(correction_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    ranked = tl.where(e < E, ranked, float("-inf"))
    if KEPT < GROUPS:
        ranked = _in_best_groups(ranked, e, group_size, E_PAD, GROUPS, GROUPS_PAD, KEPT, BEST)
    experts = tl.zeros([A_PAD], tl.int32)
    weights = tl.zeros([A_PAD], tl.float32)
    for rank in tl.static_range(A):
        chosen = tl.min(tl.where(ranked == tl.max(ranked, 0), e, E_PAD), 0)
        experts = tl.where(a == rank, chosen, experts)
        weights = tl.where(a == rank, tl.sum(tl.where(e == chosen, scores, 0.0), 0), weights)
        ranked = tl.where(e == chosen, float("-inf"), ranked)
    if NORMALIZES:
        weights = weights / (tl.sum(weights, 0) + least)
    tl.store(experts_ptr + token * A + a, experts, mask=a < A)
    tl.store(weights_ptr + token * A + a, weights * scale, mask=a < A)


def choose_in_groups(
    logits_TE: Tensor, choice: ExpertChoice, active: int, normalizes: bool, correction_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the experts int32 [T, A] of each token, best first, and their weights float32 [T, A].

    The first of equal scores wins. There are at most `MOST_GROUPS` groups.
    """
    (tokens, count), device = logits_TE.shape, logits_TE.device
    experts = torch.empty(tokens, active, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, active, dtype=torch.float32, device=device)
    _choose_kernel[(tokens,)](
        logits_TE, correction_E, experts, weights, count, logits_TE.stride(0), count // choice.groups, choice.scale,
        _LEAST,
        active, power_of_2(active), power_of_2(count), choice.groups, power_of_2(choice.groups), choice.kept_groups,
        choice.group_best, choice.scores == "sigmoid", normalizes, overlaps_launches(device),
        **launch_options(device, 1 if count <= 128 else 2),
    )  # fmt: skip
    return experts, weights
