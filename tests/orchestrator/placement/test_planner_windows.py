"""Plans of models with windows: two pools by hand arithmetic, what a request takes of both, and refusals."""

import re
from dataclasses import replace

import pytest

from harness.machines import cpus, gpus
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text

MIB = 1 << 20
FULL, WINDOW = 10 * 2 * 8 * 128 * 2, 50 * 2 * 8 * 128 * 2
"""Bytes of a token in all layers of a kind."""
SLIDING = make_facts(
    q=16, kv=8, layers=60, hidden=2048, width=4096, head_dim=128, vocab=32000, context=131072, sliding_window=1024,
    sliding_layers=tuple(layer % 6 != 5 for layer in range(60)),
)  # fmt: skip
SEEN = 1024 + 64
"""Tokens of blocks of 64 that a window of 1,024 reaches over."""


def test_both_pools_are_used_up_by_requests_of_four_windows() -> None:
    planned = plan(SLIDING, gpus(80), LayoutOptions())
    (row,) = planned.rows
    left = row.budget_bytes - row.weight_bytes - row.reserve_bytes
    requests = left // (4 * SEEN * FULL + SEEN * WINDOW)
    assert (row.kv_token_bytes, row.window_token_bytes) == (FULL + WINDOW, WINDOW)
    assert row.window_tokens == requests * SEEN
    assert row.kv_tokens == (left - row.window_tokens * WINDOW) // FULL // 64 * 64
    assert row.kv_tokens > 2 * (left // (FULL + WINDOW)), "than if all layers kept everything"
    assert layout_json(planned)["ranks"][0]["window_tokens"] == row.window_tokens  # type: ignore[index]


def test_the_table_says_what_a_request_takes() -> None:
    text = layout_text(plan(SLIDING, gpus(80), LayoutOptions(max_seq_len=65536)))
    assert "windows: 50 of 60 layers keep what a window of 1,024 tokens shows, in a pool of " in text
    assert "; a request of 65,536 tokens takes 2.7 GiB of both pools, not 15.0 GiB" in text
    assert "windows:" not in layout_text(plan(SLIDING, gpus(80), LayoutOptions(max_seq_len=1024))), "none is left"


def test_the_window_pool_is_no_larger_than_all_rows_use() -> None:
    short = replace(SLIDING, sliding_window=128)
    (row,) = plan(short, gpus(80), LayoutOptions(max_rows=8, max_batch_tokens=512)).rows
    assert row.window_tokens == 2 * 8 * (128 + 64) + 512
    assert row.kv_tokens == 8 * (131072 + 64)


def test_ranks_and_stages_have_pools_of_their_layers() -> None:
    halves = plan(SLIDING, gpus(80, 80), LayoutOptions()).rows
    assert [row.window_token_bytes for row in halves] == [WINDOW // 2] * 2
    first, last = plan(SLIDING, gpus(80, 80), LayoutOptions(device_layers="0:5;1:55")).rows
    assert (first.kv_token_bytes, first.window_token_bytes) == (WINDOW // 10, WINDOW // 10)
    assert min(first.window_tokens, last.window_tokens) > SEEN


def test_workers_find_at_least_the_tokens_that_were_planned() -> None:
    planned = plan(SLIDING, cpus(1), LayoutOptions(kv_memory=600 * MIB, dtype="bfloat16"))
    (row,) = planned.rows
    assert planned.kv_memory == planned.kv_tokens * FULL + row.window_tokens * WINDOW <= 600 * MIB


@pytest.mark.parametrize(("pool", "says"), [(64, "which is 0 tokens of"), (250, "which is ")])
def test_pools_too_small_for_a_request_are_refused_with_the_size(pool: int, says: str) -> None:
    options = LayoutOptions(kv_memory=pool * MIB, max_seq_len=8192)
    with pytest.raises(PlacementError, match="layers with a window keep 1152") as refusal:
        plan(SLIDING, gpus(80), options)
    assert says in str(refusal.value)
    match = re.search(r"Raise --kv-memory to (\d+)MiB", str(refusal.value))
    assert match is not None
    assert int(match[1]) == -(-(8192 * FULL + (SEEN + 64) * WINDOW) // MIB)
    assert plan(SLIDING, gpus(80), replace(options, kv_memory=int(match[1]) * MIB)).kv_tokens == 8192


def test_a_pool_smaller_than_a_window_serves_requests_that_never_leave_it() -> None:
    planned = plan(SLIDING, gpus(80), LayoutOptions(kv_memory=200 * MIB))
    assert planned.kv_tokens == 200 * MIB // (FULL + WINDOW) // 64 * 64 == planned.limits.max_seq_len < 1024
    assert planned.rows[0].window_tokens == 0
