"""Plans of models with linear attention: bytes of states by hand arithmetic, how they share a pool, and refusals."""

import re
from dataclasses import replace

import pytest

from harness.machines import gpus
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.described import described_machine
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.speed import estimate_speed
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.protocol.model.expert_facts import ExpertFacts

LAYERS = tuple(layer % 4 != 3 for layer in range(40))
MIB = 1 << 20
QWEN3_5_35B = make_facts(
    q=16, kv=2, layers=40, hidden=2048, width=512, head_dim=256, vocab=248320, context=262144, qk_norm=True,
    architecture="qwen3_5_moe", attention_gate=True, linear=LinearFacts(LAYERS, 16, 32, 128, 128, 4),
    experts=ExpertFacts(256, 8, 512, (True,) * 40, normalizes=True, shared_width=512, shared_gate=True),
)  # fmt: skip
STATE = 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
KV_TOKEN = 10 * 2 * 2 * 256 * 2


def test_states_and_tokens_are_counted_per_layer_of_their_kind() -> None:
    planned = plan(QWEN3_5_35B, gpus(141), LayoutOptions())
    (row,) = planned.rows
    assert (row.state_bytes, row.kv_token_bytes, row.states) == (STATE, KV_TOKEN, 256)
    left = row.budget_bytes - row.weight_bytes - row.reserve_bytes
    assert row.snapshots == left // 4 // STATE
    assert left - KV_TOKEN * 64 < row.kv_bytes + row.all_state_bytes <= left
    assert (planned.limits.max_rows, planned.limits.num_snapshots) == (256, row.snapshots)
    words = f"states: 61.4 MiB per request in all, in 30 linear layers of 40; room for 256 requests and {row.snapshots}"
    assert words in layout_text(planned)
    assert layout_json(planned)["ranks"][0]["state_bytes"] == STATE


def test_without_a_prefix_cache_no_states_are_kept_beside_those_of_the_rows() -> None:
    planned = plan(QWEN3_5_35B, gpus(141), LayoutOptions(prefix_cache=False))
    assert (planned.rows[0].snapshots, planned.limits.num_snapshots) == (0, 0)


def test_the_estimate_of_speed_says_that_one_stream_was_slower() -> None:
    speed = estimate_speed(plan(QWEN3_5_35B, described_machine("1xH200", {}), LayoutOptions()))
    assert speed is not None
    assert "a third slower where it was measured" in speed.source


def test_what_is_left_out_is_noted() -> None:
    planned = plan(replace(QWEN3_5_35B, left_out=("its multi-token head",)), gpus(141), LayoutOptions())
    assert "its multi-token head is left out: tokens come one at a time" in planned.notes


def test_ranks_share_states_by_heads() -> None:
    planned = plan(QWEN3_5_35B, gpus(80, 80), LayoutOptions())
    assert [row.state_bytes for row in planned.rows] == [STATE // 2] * 2


def test_stages_have_the_states_of_their_layers() -> None:
    planned = plan(QWEN3_5_35B, gpus(141, 141), LayoutOptions(device_layers="0:3;1:37"))
    assert [row.state_bytes for row in planned.rows] == [STATE // 10, STATE // 30 * 27]
    assert [row.kv_token_bytes for row in planned.rows] == [0, KV_TOKEN]
    assert planned.kv_tokens == planned.rows[1].kv_tokens


def test_fewer_requests_run_at_once_where_their_states_would_fill_the_pool() -> None:
    planned = plan(QWEN3_5_35B, gpus(141), LayoutOptions(kv_memory=1024 * MIB))
    assert planned.limits.max_rows == planned.rows[0].states == 512 * MIB // STATE == 8
    assert planned.limits.num_snapshots == 256 * MIB // STATE == 4
    assert planned.kv_tokens == (1024 * MIB - 12 * STATE) // KV_TOKEN // 64 * 64
    assert planned.kv_memory == planned.kv_tokens * KV_TOKEN + 12 * STATE
    assert any("8 requests at once instead of 256 (--max-rows)" in note for note in planned.notes)


def test_a_pool_too_small_for_one_sequence_is_refused_with_what_to_type() -> None:
    with pytest.raises(
        PlacementError, match=r"states of one sequence, 61\.4 MiB.* Raise --kv-memory to (\d+)MiB"
    ) as error:
        plan(QWEN3_5_35B, gpus(141), LayoutOptions(kv_memory=60 * MIB))
    (asked,) = re.findall(r"--kv-memory to (\d+)MiB", str(error.value))
    assert plan(QWEN3_5_35B, gpus(141), LayoutOptions(kv_memory=int(asked) * MIB)).limits.max_rows == 1
    with pytest.raises(PlacementError, match=f"Raise --kv-memory to {asked}MiB"):
        plan(QWEN3_5_35B, gpus(141), LayoutOptions(kv_memory=(int(asked) - 1) * MIB))


def test_unequal_shares_are_refused_for_linear_layers() -> None:
    facts = replace(QWEN3_5_35B, num_kv_heads=4)
    with pytest.raises(PlacementError, match="16 key heads of linear attention are split evenly only; use --tp 2"):
        plan(facts, gpus(141, 141), LayoutOptions(tp_shares="3,1"))


def test_heads_of_linear_attention_that_do_not_divide_are_named() -> None:
    with pytest.raises(PlacementError, match="16 key heads of linear attention % 3 = 1"):
        plan(QWEN3_5_35B, gpus(141, 141, 141), LayoutOptions(tp=3))
