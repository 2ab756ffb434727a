# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Choose tokens among the best of each rank's slice of the vocabulary, through peer memory.

Only (score, id) pairs are exchanged. Equal scores go to the lowest id, as within a slice.
"""

# S rows that sample

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.peers.memory import Area, AreaShape, PeerAlarm, empty_bits
from mgpu.worker.kernels.peers.messages import BITS, TIMED, clean_bits, receive, send
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

_BLOCK = 64
"""Rows per program, at least as many as a warp has threads: see `receive`."""


@triton.jit
def _store_best(
    scores, ids, exists, s, mask, last_id, rows_ptr, positions_ptr, out_ptr, tokens_ptr, tokens_stride,
):  # fmt: skip
    """Store the token with the best score of each column, and write it to the rows."""
    scores = tl.where(exists, scores, float("-inf"))
    best = tl.max(scores, 0)
    chosen = tl.min(tl.where(exists & (scores == best[None, :]), ids, 2147483647), 0)
    chosen = tl.maximum(tl.minimum(chosen, last_id), 0)  # scores that are all NaN: some token that exists
    tl.store(out_ptr + s, chosen, mask=mask)
    if tokens_ptr is not None:
        owner = tl.load(rows_ptr + s, mask=mask, other=0).to(tl.int64)
        position = tl.load(positions_ptr + s, mask=mask, other=0)
        # No token is ever chosen for position 0: such rows only fill up a graph's batch.
        tl.store(tokens_ptr + owner * tokens_stride + position, chosen, mask=mask & (position > 0))


@triton.jit(do_not_specialize=["rank", "timeout_us", "S", "last_id"])
def _exchange_kernel(
    scores_ptr, ids_ptr, rows_ptr, positions_ptr, out_ptr, tokens_ptr,
    inbox_ptr, peers, turns_ptr, failed_ptr, seen_ptr,
    tokens_stride, S, last_id, rank, timeout_us,
    ROWS: tl.constexpr, RANKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    BITS: tl.constexpr, EMPTY: tl.constexpr, TIMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    s = block * BLOCK + tl.arange(0, BLOCK)
    mask = s < S
    wait_for_inputs(OVERLAP)
    turn = tl.load(turns_ptr + block)
    score = clean_bits(tl.load(scores_ptr + s, mask=mask, other=0.0), BITS, EMPTY)
    token = tl.load(ids_ptr + s, mask=mask, other=0)
    first = (turn * RANKS + rank) * 2 * ROWS + s
    for peer in tl.static_range(RANKS):
        send(peers[peer], first, score, mask, BITS)
        send(peers[peer], first + ROWS, token, mask, BITS)
    source = tl.arange(0, PADDED)[:, None]
    arrives = (source < RANKS) & mask[None, :]
    places = inbox_ptr + (turn * RANKS + source) * 2 * ROWS + s[None, :]
    scores = receive(places, arrives, failed_ptr, seen_ptr, timeout_us, EMPTY, TIMED).to(tl.float32, bitcast=True)
    ids = receive(places + ROWS, arrives, failed_ptr, seen_ptr, timeout_us, EMPTY, TIMED)
    _store_best(scores, ids, arrives, s, mask, last_id, rows_ptr, positions_ptr, out_ptr, tokens_ptr, tokens_stride)
    tl.store(turns_ptr + block, 1 - turn)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Exchange the pairs of up to ``rows`` rows; all ranks are made with the same numbers."""

    area: Area
    alarm: PeerAlarm
    rank: int
    rows: int

    @staticmethod
    def shapes(ranks: int, rows: int) -> list[AreaShape]:
        """Return the areas that it needs."""
        return [AreaShape(torch.int32, ranks * 2 * rows, ceil_div(rows, _BLOCK))]

    def __call__(
        self,
        scores_S: Tensor,
        ids_S: Tensor,
        last_id: int,
        rows_S: Tensor | None = None,
        positions_S: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Return the best of all ranks' tokens, int32 [S], from the results of `sample` on each rank.

        ``last_id`` is the last of the whole vocabulary. With ``tokens``, the choice is also written where the next step
        reads it, as `sample` does for a single rank.
        """
        count, device = scores_S.shape[0], scores_S.device
        out_S = torch.empty(count, dtype=torch.int32, device=device)
        ranks = len(self.area.peers)
        _exchange_kernel[(ceil_div(count, _BLOCK),)](
            scores_S, ids_S, rows_S, positions_S, out_S, tokens,
            self.area.inbox, self.area.peers, self.area.turns, self.alarm.failed, self.alarm.seen,
            0 if tokens is None else tokens.stride(0), count, last_id, self.rank, self.alarm.timeout_us,
            self.rows, ranks, power_of_2(ranks), _BLOCK,
            BITS[torch.int32], empty_bits(torch.int32), TIMED, overlaps_launches(device),
            **launch_options(device, 1),
        )  # fmt: skip
        return out_S


@triton.jit(do_not_specialize=["S", "last_id"])
def _best_kernel(
    pairs_ptr, rows_ptr, positions_ptr, out_ptr, tokens_ptr, tokens_stride, S, last_id,
    RANKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = s < S
    wait_for_inputs(OVERLAP)
    source = tl.arange(0, PADDED)[:, None]
    exists = (source < RANKS) & mask[None, :]
    places = pairs_ptr + (s[None, :] * RANKS + source) * 2
    scores = tl.load(places, mask=exists, other=0).to(tl.float32, bitcast=True)
    ids = tl.load(places + 1, mask=exists, other=0)
    _store_best(scores, ids, exists, s, mask, last_id, rows_ptr, positions_ptr, out_ptr, tokens_ptr, tokens_stride)


def best_of_ranks(
    pairs_SP: Tensor, ranks: int, last_id: int, rows_S: Tensor, positions_S: Tensor, tokens: Tensor
) -> Tensor:
    """Do what `Exchange` does with pairs of score (its bits) and id that another way has gathered, int32 [S, 2 ranks].

    For groups whose sums are NCCL's.
    """
    count, device = len(pairs_SP), pairs_SP.device
    out_S = torch.empty(count, dtype=torch.int32, device=device)
    _best_kernel[(ceil_div(count, _BLOCK),)](
        pairs_SP, rows_S, positions_S, out_S, tokens, tokens.stride(0), count, last_id,
        ranks, power_of_2(ranks), _BLOCK, overlaps_launches(device), **launch_options(device, 1),
    )  # fmt: skip
    return out_S
