# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Choose the experts of many tokens, and put the pairs of token and expert into the order of experts.

Up to 512 tokens take two kernels. The first has a program for each tile of tokens and stretch of K. The second has one
for each token: it adds up the scores, chooses, and takes places in the lists of the chosen experts by counting. More
tokens take one kernel: a program scores and chooses for a tile of tokens, and takes all places that these need in an
expert's list at once.

Each expert's list has a place for each token. The last program makes the list of tiles. Which pair has which place in
an expert's list differs from run to run; results do not, since each row of a product is computed by itself.
"""

# T tokens, E experts, A active experts of a token, K model dim, N experts of this rank, M tiles

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.experts.route import best_of
from mgpu.worker.kernels.experts.sort import SortedPairs, most_tiles, write_tiles
from mgpu.worker.kernels.runtime import (
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
    shared_bytes,
    wait_for_inputs,
)

MANY_TOKENS = 512
"""Up to so many tokens each is chosen for by a program of its own."""
_COUNTS = 64
"""Where the counts of experts begin in the workspace's counters."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How experts are chosen from their scores, and which of them this rank has."""

    active: int
    normalizes: bool
    bias_E: Tensor | None
    first: int
    held: int


@triton.jit
def _load_rows(ptr, rows, k, is_row, K, stride):
    offsets = rows[:, None].to(tl.int64) * stride + k[None, :]
    return tl.load(ptr + offsets, mask=is_row[:, None] & (k < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T"])
def _scores_kernel(
    x_ptr, w_ptr, partial_ptr, T, K, E, x_stride, w_stride,
    E_PAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    w = _load_rows(w_ptr, e, k, e < E, K, w_stride)  # weights depend on no kernel
    wait_for_inputs(OVERLAP)
    x = _load_rows(x_ptr, t, k, t < T, K, x_stride)
    scores = tl.dot(x, tl.trans(w), input_precision="ieee")
    places = (t[:, None] * SPLITS + split) * E_PAD + e[None, :]
    tl.store(partial_ptr + places, scores, mask=(t < T)[:, None])


@triton.jit
def _make_tiles(tiles_ptr, num_tiles_ptr, counts_ptr, T, N, block_m, N_PAD: tl.constexpr):
    """Write the list of tiles once all pairs are counted, and make the counts zero again."""
    n = tl.arange(0, N_PAD)
    counts = tl.minimum(tl.load(counts_ptr + n, mask=n < N, other=0, cache_modifier=".cg"), T)
    tl.store(counts_ptr + n, 0, mask=n < N)
    write_tiles(tiles_ptr, num_tiles_ptr, n * T, counts, n, block_m)


@triton.jit(do_not_specialize=["T", "first_expert", "block_m"])
def _choose_kernel(
    partial_ptr, bias_ptr, experts_ptr, weights_ptr, order_ptr, tiles_ptr, num_tiles_ptr, counter_ptr, counts_ptr,
    T, E, first_expert, N, block_m,
    A: tl.constexpr, A_PAD: tl.constexpr, E_PAD: tl.constexpr, N_PAD: tl.constexpr, NORMALIZES: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    e = tl.arange(0, E_PAD)
    s = tl.arange(0, SPLITS_PAD)
    a = tl.arange(0, A_PAD)
    wait_for_inputs(OVERLAP)
    places = (token * SPLITS + s[:, None]) * E_PAD + e[None, :]
    scores = tl.sum(tl.load(partial_ptr + places, mask=(s < SPLITS)[:, None], other=0.0), 0)
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    scores = tl.where(e < E, scores, float("-inf"))
    experts, weights = best_of(scores, e, A, A_PAD, NORMALIZES)
    tl.store(experts_ptr + token * A + a, experts, mask=a < A)
    tl.store(weights_ptr + token * A + a, weights, mask=a < A)
    mine = experts - first_expert
    is_here = (a < A) & (mine >= 0) & (mine < N)
    place = tl.atomic_add(counts_ptr + mine, 1, mask=is_here, sem="relaxed")
    # Each expert has a place for each token. Where scores are no numbers a token may choose an expert twice.
    tl.store(order_ptr + mine * T + place, token * A + a, mask=is_here & (place < T))
    tl.debug_barrier()  # all threads' stores precede the release below
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == T - 1:
        tl.store(counter_ptr, 0)
        _make_tiles(tiles_ptr, num_tiles_ptr, counts_ptr, T, N, block_m, N_PAD)


@triton.jit
def _best_experts(scores, e, A: tl.constexpr, A_PAD: tl.constexpr, BLOCK_T: tl.constexpr, NORMALIZES: tl.constexpr):
    """Return what `best_of` returns for each row of scores [BLOCK_T, E], and the rank of each expert, A if not chosen.

    No expert is chosen twice, whatever the scores.
    """
    a = tl.arange(0, A_PAD)
    ranks = tl.full([BLOCK_T, scores.shape[1]], A, tl.int32)
    peak = tl.max(scores, 1)
    total = tl.sum(tl.exp(scores - peak[:, None]), 1)
    experts = tl.zeros([BLOCK_T, A_PAD], tl.int32)
    weights = tl.zeros([BLOCK_T, A_PAD], tl.float32)
    for rank in tl.static_range(A):
        best = tl.max(scores, 1)
        is_best = (scores == best[:, None]) & (ranks == A)
        chosen = tl.min(tl.where(is_best, e[None, :], scores.shape[1]), 1)
        is_chosen = e[None, :] == chosen[:, None]
        scores = tl.where(is_chosen, float("-inf"), scores)
        ranks = tl.where(is_chosen, rank, ranks)
        experts = tl.where(a[None, :] == rank, chosen[:, None], experts)
        weights = tl.where(a[None, :] == rank, tl.exp(best - peak)[:, None], weights)
    if NORMALIZES:
        total = tl.sum(weights, 1)
    return experts, weights / total[:, None], ranks


@triton.jit(do_not_specialize=["T", "first_expert", "block_m"])
def _many_kernel(
    x_ptr, w_ptr, bias_ptr, experts_ptr, weights_ptr, order_ptr, tiles_ptr, num_tiles_ptr, counter_ptr, counts_ptr,
    T, K, E, x_stride, w_stride, first_expert, N, block_m,
    A: tl.constexpr, A_PAD: tl.constexpr, E_PAD: tl.constexpr, N_PAD: tl.constexpr, NORMALIZES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    k = tl.arange(0, BLOCK_K)
    scores = tl.zeros([BLOCK_T, E_PAD], tl.float32)
    wait_for_inputs(OVERLAP)
    for first in range(0, K, BLOCK_K):
        w = _load_rows(w_ptr, e, first + k, e < E, K, w_stride)
        x = _load_rows(x_ptr, t, first + k, t < T, K, x_stride)
        scores = tl.dot(x, tl.trans(w), scores, input_precision="ieee")
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    scores = tl.where((e < E)[None, :], scores, float("-inf"))
    experts, weights, ranks = _best_experts(scores, e, A, A_PAD, BLOCK_T, NORMALIZES)
    a = tl.arange(0, A_PAD)
    places = t[:, None] * A + a[None, :]
    is_pair = (t < T)[:, None] & (a < A)[None, :]
    tl.store(experts_ptr + places, experts, mask=is_pair)
    tl.store(weights_ptr + places, weights, mask=is_pair)
    mine = e - first_expert
    is_here = (mine >= 0) & (mine < N)
    is_mine = (t < T)[:, None] & (ranks < A) & is_here[None, :]
    one = is_mine.to(tl.int32)
    begin = tl.atomic_add(counts_ptr + mine, tl.sum(one, 0), mask=is_here, sem="relaxed")
    place = begin[None, :] + tl.cumsum(one, 0) - one
    tl.store(order_ptr + mine[None, :].to(tl.int64) * T + place, t[:, None] * A + ranks, mask=is_mine)
    tl.debug_barrier()  # all threads' counting precedes the release below
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counter_ptr, 0)
        _make_tiles(tiles_ptr, num_tiles_ptr, counts_ptr, T, N, block_m, N_PAD)


def route_and_sort(
    x_TK: Tensor, w_EK: Tensor, choice: Choice, block_m: int
) -> tuple[tuple[Tensor, Tensor], SortedPairs]:
    """Return the experts int32 [T, A] of each token and their weights float32 [T, A], and this rank's pairs sorted."""
    tokens, device = len(x_TK), x_TK.device
    pairs = tokens * choice.active
    tiles = most_tiles(pairs, choice.held, block_m)
    weights = torch.empty(tokens, choice.active, dtype=torch.float32, device=device)
    # One allocation, whose parts begin at multiples of 16 bytes: kernels are compiled anew for any other addresses.
    lengths = [ceil_div(length, 4) * 4 for length in (pairs, choice.held * tokens, 4 * tiles, 1)]
    memory = torch.empty(sum(lengths), dtype=torch.int32, device=device)
    experts, order, table, number = memory.split(lengths)
    experts_TA = experts[:pairs].view(tokens, choice.active)
    found = SortedPairs(order, table.view(tiles, 4), number, block_m)
    choose = _few_tokens if tokens <= MANY_TOKENS else _many_tokens
    choose(x_TK, w_EK, choice, experts_TA, weights, found)
    return (experts_TA, weights), found


def score_tile(experts_pad: int, block_k: int, dtype: torch.dtype, shared: int) -> int:
    """Return how many experts a program scores for 16 tokens: all, if their weights fit into so much shared memory.

    In float32, which is for correctness, at most 64: more spill registers.
    """
    block_e = min(64, experts_pad) if dtype == torch.float32 else experts_pad
    while (16 + block_e) * block_k * dtype.itemsize > shared:
        block_e //= 2
    return block_e


def step_length(rows: int, dtype: torch.dtype, shared: int) -> int:
    """Return over how many channels a step goes, so that two steps of so many rows fit into shared memory."""
    block_k = 64
    while 2 * rows * block_k * dtype.itemsize > shared and block_k > 16:
        block_k //= 2
    return block_k


def _few_tokens(
    x_TK: Tensor, w_EK: Tensor, choice: Choice, experts_TA: Tensor, weights_TA: Tensor, found: SortedPairs
) -> None:
    (tokens, k), count, device = x_TK.shape, len(w_EK), x_TK.device
    experts_pad, workspace, overlap = max(16, power_of_2(count)), default_workspace(device), overlaps_launches(device)
    block_k = min(128, max(16, power_of_2(k)))
    splits = ceil_div(k, block_k)
    workspace.require(tokens * splits * experts_pad, _COUNTS + choice.held)
    block_e = score_tile(experts_pad, block_k, x_TK.dtype, shared_bytes(device))
    _scores_kernel[(ceil_div(tokens, 16), splits, experts_pad // block_e)](
        x_TK, w_EK, workspace.partials, tokens, k, count, x_TK.stride(0), w_EK.stride(0),
        experts_pad, splits, 16, block_e, block_k, overlap,
        **launch_options(device, 4, 1),
    )  # fmt: skip
    _choose_kernel[(tokens,)](
        workspace.partials, choice.bias_E, experts_TA, weights_TA, found.order_P, found.tiles_M4, found.num_tiles,
        workspace.counters, workspace.counters[_COUNTS:],
        tokens, count, choice.first, choice.held, found.block_m,
        choice.active, power_of_2(choice.active), experts_pad, power_of_2(choice.held), choice.normalizes,
        splits, power_of_2(splits), overlap,
        **launch_options(device, 1, 1),
    )  # fmt: skip


def _many_tokens(
    x_TK: Tensor, w_EK: Tensor, choice: Choice, experts_TA: Tensor, weights_TA: Tensor, found: SortedPairs
) -> None:
    (tokens, k), count, device = x_TK.shape, len(w_EK), x_TK.device
    experts_pad, workspace, overlap = max(16, power_of_2(count)), default_workspace(device), overlaps_launches(device)
    block_t = 32 if experts_pad <= 128 and x_TK.dtype != torch.float32 else 16
    block_k = min(step_length(block_t + experts_pad, x_TK.dtype, shared_bytes(device)), max(16, power_of_2(k)))
    workspace.require(0, _COUNTS + choice.held)
    _many_kernel[(ceil_div(tokens, block_t),)](
        x_TK, w_EK, choice.bias_E, experts_TA, weights_TA, found.order_P, found.tiles_M4, found.num_tiles,
        workspace.counters, workspace.counters[_COUNTS:],
        tokens, k, count, x_TK.stride(0), w_EK.stride(0), choice.first, choice.held, found.block_m,
        choice.active, power_of_2(choice.active), experts_pad, power_of_2(choice.held), choice.normalizes,
        block_t, block_k, overlap,
        **launch_options(device, 4, 3),
    )  # fmt: skip
