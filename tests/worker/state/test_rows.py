"""Rows keep tokens, blocks and sampling between steps, and turn plans into batches."""

import struct
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan
from mgpu.worker.errors import BadPlan
from mgpu.worker.state.rows import RowTable

BLOCK = 4


def make_table() -> RowTable:
    return RowTable(max_rows=4, max_seq_len=20, block_size=BLOCK, num_blocks=10, device=torch.device("cpu"))


def row_of(row: int, ids: list[int], blocks: list[int], sampling: RowSampling | None = None) -> NewRow:
    return NewRow(row, struct.pack(f"<{len(ids)}i", *ids), len(ids), blocks, sampling or RowSampling())


def plan_of(
    rows: list[int],
    starts: list[int],
    counts: list[int],
    samples: list[int],
    new: list[NewRow] | None = None,
    freed: list[int] | None = None,
    appended: tuple[list[int], list[int]] = ([], []),
) -> StepPlan:
    return StepPlan(1, 1, freed or [], new or [], *appended, rows, starts, counts, samples)


def lists(*tensors: Tensor) -> list[list[int]]:
    return [tensor.tolist() for tensor in tensors]


def test_a_mixed_step_becomes_one_batch() -> None:
    table = make_table()
    rows = [row_of(2, [10, 11, 12, 13, 14, 15], [7, 3]), row_of(0, [20, 21], [5])]
    plan = plan_of([2, 0], [1, 1], [4, 1], [0, 1], new=rows)
    table.apply(plan)
    batch, request = table.batch(plan)
    assert lists(batch.token_ids, batch.positions) == [[11, 12, 13, 14, 21], [1, 2, 3, 4, 1]]
    assert batch.slots.tolist() == [29, 30, 31, 12, 21]
    assert lists(batch.query_starts, batch.context_lens) == [[0, 4, 5], [5, 2]]
    assert batch.block_tables[0].tolist() == [7, 3]
    assert batch.block_tables[1, 0] == 5
    assert batch.logit_rows.tolist() == [4]
    assert (batch.query_lens_host, batch.context_lens_host) == ([4, 1], [5, 2])
    assert request is not None
    assert (request.rows, request.positions) == ([0], [2])
    dtypes = [batch.token_ids.dtype, batch.positions.dtype, batch.slots.dtype, batch.logit_rows.dtype]
    assert dtypes == [torch.int64] * 4
    assert batch.query_starts.dtype is batch.context_lens.dtype is batch.block_tables.dtype is torch.int32


def test_sampled_tokens_feed_the_next_step() -> None:
    table = make_table()
    first = plan_of([1, 3], [0, 0], [4, 2], [1, 1], new=[row_of(1, [1, 2, 3, 4], [0]), row_of(3, [5, 6], [1])])
    table.apply(first)
    _, request = table.batch(first)
    assert request is not None
    table.write_sampled(request, torch.tensor([77, 88], dtype=torch.int32))
    second = plan_of([3, 1], [2, 4], [1, 1], [1, 1], appended=([1], [9]))
    table.apply(second)
    batch, request = table.batch(second)
    assert batch.token_ids.tolist() == [88, 77]
    assert batch.slots.tolist() == [1 * BLOCK + 2, 9 * BLOCK]
    assert request is not None
    assert request.positions == [3, 5]


def test_several_blocks_can_be_appended_to_one_row_at_once() -> None:
    table = make_table()
    plan = plan_of([0], [0], [10], [0], new=[row_of(0, [*range(10)], [4])], appended=([0, 0], [8, 6]))
    table.apply(plan)
    assert table.batch(plan)[0].block_tables.tolist() == [[4, 8, 6]]


def test_a_row_changes_hands_within_one_plan() -> None:
    table = make_table()
    table.apply(plan_of([], [], [], [], new=[row_of(0, [1, 2, 3, 4, 5], [1, 2], RowSampling(temperature=0.5))]))
    plan = plan_of([0], [0], [2], [1], new=[row_of(0, [8, 9], [3], RowSampling(temperature=0.7))], freed=[0])
    table.apply(plan)
    batch, _ = table.batch(plan)
    assert lists(batch.token_ids, batch.slots) == [[8, 9], [12, 13]]
    assert table.temperatures[0] == pytest.approx(0.7)
    assert table.sampling[0].temperature == 0.7
    with pytest.raises(BadPlan, match="row 0 reaches 5 tokens with 1 blocks"):
        table.batch(plan_of([0], [4], [1], [1]))


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**63, 2**64 - 1])
def test_seeds_of_64_bits_are_kept_in_two_halves(seed: int) -> None:
    table = make_table()
    table.apply(plan_of([], [], [], [], new=[row_of(0, [1], [1], RowSampling(seed=seed))]))
    low, high = table.seeds[0].tolist()
    assert (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 == seed


def test_a_row_that_is_full_leaves_the_others_alone() -> None:
    table = make_table()
    for row in (1, 3):
        sampling = RowSampling(seed=100 + row, temperature=0.5)
        table.apply(plan_of([], [], [], [], new=[row_of(row, [row] * 9, [row, row + 1, row + 2], sampling)]))
    before = [column[[1, 3]].clone() for column in (table.tokens, table.blocks, table.seeds, table.temperatures)]
    full = row_of(2, [9] * 21, [9] * 6, RowSampling(seed=2**64 - 1, temperature=100.0))
    for new in (full, row_of(2, [8], [7])):
        table.apply(plan_of([], [], [], [], new=[new]))
        after = [column[[1, 3]] for column in (table.tokens, table.blocks, table.seeds, table.temperatures)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (table.tokens[2, 0], table.blocks[2].tolist()) == (8, [7, 0, 0, 0, 0, 0])


def test_the_longest_request_may_be_sampled_once_more() -> None:
    table = make_table()
    plan = plan_of([0], [0], [20], [1], new=[row_of(0, [*range(20)], [*range(5)])])
    table.apply(plan)
    _, request = table.batch(plan)
    assert request is not None
    table.write_sampled(request, torch.tensor([5], dtype=torch.int32))


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (plan_of([0], [0], [1], [1], new=[row_of(0, [1], [10])]), r"blocks 10\.\.10 in a pool of 10"),
        (plan_of([0], [0], [1], [1], new=[row_of(0, [1], [-1])]), r"blocks -1\.\.-1"),
        (plan_of([0], [0], [1], [1], new=[row_of(0, [1] * 22, [0])]), "row 0 with 22 tokens"),
        (plan_of([0], [0], [5], [1], new=[row_of(0, [1] * 5, [0])]), "reaches 5 tokens with 1 blocks"),
        (plan_of([0], [0], [0], [1], new=[row_of(0, [1], [0])]), "at least one token"),
        (plan_of([0], [-1], [1], [1], new=[row_of(0, [1], [0])]), "a position"),
        (plan_of([1], [0], [1], [1]), "row 1 reaches 1 tokens with 0 blocks"),
        (plan_of([0], [0], [1], [1], new=[row_of(0, [1], [*range(6)])], appended=([0], [6])), "more than 6 blocks"),
    ],
    ids=["block-too-high", "negative", "too-long", "uncovered", "no-token", "before-start", "never-filled", "append"],
)
def test_impossible_plans_are_refused(plan: StepPlan, complaint: str) -> None:
    with pytest.raises(BadPlan, match=complaint):
        take(make_table(), plan)


def take(table: RowTable, plan: StepPlan) -> None:
    table.apply(plan)
    table.batch(plan)


def test_a_decode_step_is_told_the_blocks_that_its_rows_need_next() -> None:
    table = make_table()
    table.apply(plan_of([], [], [], [], new=[row_of(1, [1, 2, 3, 4], [0]), row_of(3, [5, 6], [1])]))
    assert table.apply_decode(plan_of([3, 1], [2, 4], [1, 1], [1, 1], appended=([1], [9]))).blocks == [-1, 9]
    assert table.apply_decode(plan_of([3, 1], [3, 5], [1, 1], [1, 1])).blocks == [-1, -1]


def test_pages_of_blocks_are_noted_at_once_or_by_the_kernel_that_appends_them() -> None:
    table = RowTable(4, 20, BLOCK, 10, torch.device("cpu"), num_pages=3)
    assert table.pages is not None
    new = [row_of(1, [1, 2, 3, 4], [7]), row_of(3, [5, 6], [8])]
    table.apply(replace(plan_of([], [], [], [], new=new), page_blocks=[7, 8], page_ids=[2, 0]))
    in_pages = table.batch(plan_of([1, 3], [2, 1], [1, 1], [1, 1]))[0].in_pages
    assert in_pages is not None
    assert in_pages.tables[:, 0].tolist() == [2, 0]
    assert in_pages.slots.tolist() == [2 * BLOCK + 2, 1]
    plan = replace(plan_of([3, 1], [2, 4], [1, 1], [1, 1], appended=([1], [9])), page_blocks=[9, 5], page_ids=[1, 2])
    assert table.apply_decode(plan) == ([-1, 9], [0, 1])
    assert table.pages[[7, 8, 5]].tolist() == [2, 0, 2]
    for block, page in ((10, 0), (1, 3), (1, -1)):
        with pytest.raises(BadPlan, match="in a pool of"):
            table.apply(replace(plan_of([], [], [], []), page_blocks=[block], page_ids=[page]))


def test_blocks_that_a_decode_step_does_not_reach_are_written_at_once() -> None:
    table = make_table()
    table.apply(plan_of([], [], [], [], new=[row_of(1, [1, 2], [0])]))
    plan = plan_of([1], [2], [1], [1], appended=([1, 1], [9, 5]))
    assert table.apply_decode(plan) == ([-1], [])
    assert table.blocks[1, :3].tolist() == [0, 9, 5]


def test_a_decode_step_is_refused_what_its_rows_have_no_room_for() -> None:
    table = make_table()
    table.apply(plan_of([], [], [], [], new=[row_of(1, [1, 2, 3, 4], [0])]))
    with pytest.raises(BadPlan, match="row 1 reaches 5 tokens with 1 blocks"):
        table.apply_decode(plan_of([1], [4], [1], [1]))
    with pytest.raises(BadPlan, match=r"blocks 10\.\.10"):
        table.apply_decode(plan_of([1], [4], [1], [1], appended=([1], [10])))
