# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Sort (token, expert) pairs that are chosen already by expert, and cut each expert's pairs into tiles of rows.

One program per expert looks for its pairs. The last program to finish makes the list of tiles, of which the grid of a
grouped product takes as many as there could be: programs past the end of the list leave at once. So no count is read
on the host, and a CUDA graph stays valid.

Worked example: 3 tokens choose the experts (2, 0), (2, 1), (2, 0). Pair p is token p // 2. Sorted: pairs 1 and 5 of
expert 0, pair 3 of expert 1, pairs 0, 2 and 4 of expert 2. With tiles of 2 rows the list is (expert 0, rows 0 to 2),
(expert 1, rows 2 to 3), (expert 2, rows 3 to 5), (expert 2, rows 5 to 6).
"""

# P pairs, N experts of this rank, M tiles

from typing import NamedTuple

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

_FEW_PAIRS, _MANY_PAIRS = 512, 4096
"""Pairs that a program looks at at once."""


class SortedPairs(NamedTuple):
    """Pairs in the order of experts, and the tiles that they are cut into."""

    order_P: Tensor
    """int32: this rank's pairs, those of an expert side by side."""
    tiles_M4: Tensor
    """int32 [M, 4]: expert of this rank, first row, end row of the expert, and how far the places of its pairs in
    ``order_P`` lie behind its rows. Rows are numbered without gaps."""
    num_tiles: Tensor
    """int32, the first of several."""
    block_m: int


@triton.jit
def write_tiles(tiles_ptr, num_tiles_ptr, places, counts, n, block_m):
    """Write the list of tiles of the experts ``n``, whose ``counts`` pairs are at ``places``, and its length."""
    begins = tl.cumsum(counts, 0) - counts
    tiles = (counts + block_m - 1) // block_m
    firsts = tl.cumsum(tiles, 0) - tiles
    tl.store(num_tiles_ptr, tl.sum(tiles, 0))
    for at in range(tl.max(tiles, 0)):
        entry = tiles_ptr + (firsts + at) * 4
        is_there = at < tiles
        tl.store(entry, n, mask=is_there)
        tl.store(entry + 1, begins + at * block_m, mask=is_there)
        tl.store(entry + 2, begins + counts, mask=is_there)
        tl.store(entry + 3, places - begins, mask=is_there)


@triton.jit
def tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M: tl.constexpr):
    """Return the expert of a tile, its rows, which of them are there, and their pairs."""
    expert = tl.load(tiles_ptr + 4 * tile)
    row = tl.load(tiles_ptr + 4 * tile + 1) + tl.arange(0, BLOCK_M)
    is_row = row < tl.load(tiles_ptr + 4 * tile + 2)
    pair = tl.load(order_ptr + row + tl.load(tiles_ptr + 4 * tile + 3), mask=is_row, other=0)
    return expert, row, is_row, pair


@triton.jit(do_not_specialize=["pairs", "first_expert", "block_m"])
def _sort_kernel(
    experts_ptr, order_ptr, bounds_ptr, tiles_ptr, num_tiles_ptr, counter_ptr,
    pairs, first_expert, N, block_m,
    BLOCK_P: tl.constexpr, N_PAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    wait_for_inputs(OVERLAP)
    before = tl.zeros([BLOCK_P], tl.int32)
    mine = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, pairs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        chosen = tl.load(experts_ptr + p, mask=p < pairs, other=-1) - first_expert
        chosen = tl.where(p < pairs, chosen, -1)
        before += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
        mine += (chosen == expert).to(tl.int32)
    begin = tl.sum(before, 0)
    count = tl.sum(mine, 0)
    place = begin
    for start in range(0, pairs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        chosen = tl.load(experts_ptr + p, mask=p < pairs, other=-1) - first_expert
        is_mine = ((chosen == expert) & (p < pairs)).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(is_mine, 0) - 1, p, mask=is_mine > 0)
        place += tl.sum(is_mine, 0)
    tl.store(bounds_ptr + 2 * expert, begin)
    tl.store(bounds_ptr + 2 * expert + 1, count)
    tl.debug_barrier()  # all threads' stores precede the release below
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == N - 1:
        n = tl.arange(0, N_PAD)
        begins = tl.load(bounds_ptr + 2 * n, mask=n < N, other=0, cache_modifier=".cg")
        counts = tl.load(bounds_ptr + 2 * n + 1, mask=n < N, other=0, cache_modifier=".cg")
        write_tiles(tiles_ptr, num_tiles_ptr, begins, counts, n, block_m)
        tl.store(counter_ptr, 0)


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """Return the most tiles that so many pairs can be cut into, however the router chooses."""
    return pairs // block_m + min(pairs, experts)


def sort_pairs(experts_TA: Tensor, first_expert: int, count: int, block_m: int) -> SortedPairs:
    """Sort the pairs of the experts [first_expert, first_expert + count); leave the others out."""
    pairs, device = experts_TA.numel(), experts_TA.device
    tiles = most_tiles(pairs, count, block_m)
    # One allocation, whose parts begin at multiples of 16 bytes: kernels are compiled anew for any other addresses.
    lengths = [ceil_div(length, 4) * 4 for length in (pairs, 2 * count, 4 * tiles, 1)]
    memory = torch.empty(sum(lengths), dtype=torch.int32, device=device)
    order, bounds, table, number = memory.split(lengths)
    block_p = _FEW_PAIRS if pairs <= _FEW_PAIRS else _MANY_PAIRS
    _sort_kernel[(count,)](
        experts_TA, order, bounds, table, number, default_workspace(device).counters,
        pairs, first_expert, count, block_m,
        block_p, power_of_2(count), overlaps_launches(device),
        **launch_options(device, 4 if block_p == _FEW_PAIRS else 8),
    )  # fmt: skip
    return SortedPairs(order[:pairs], table.view(tiles, 4), number, block_m)
