"""The bytes of a plan: weights, KV pool, steps, and the longest request."""

import re

import pytest

from harness.assertions import assert_has_all
from harness.machines import GIB, QWEN3_32B, SMOLLM2, TINY, cpus, gpus
from harness.planning import LLAMA2_7B, LLAMA_8B, planned, refusal
from mgpu.orchestrator.placement.machine.devices import Machine, oversubscribed
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.split.sizes import step_bytes
from mgpu.protocol.model.placement import Stage


def test_weights_of_all_ranks_add_up_to_the_model() -> None:
    whole = planned(LLAMA2_7B, gpus(80)).rows[0].weight_bytes
    assert whole == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096)
    split = planned(LLAMA2_7B, gpus(*[80] * 4)).rows
    norms = 2 * (32 * 2 * 4096 + 4096)
    assert sum(row.weight_bytes for row in split) == whole + 3 * norms
    mapped = planned(LLAMA2_7B, gpus(*[80] * 4, nccl=False)).rows
    assert sum(row.weight_bytes for row in mapped) == whole


def test_a_tied_embedding_is_held_twice_when_its_stages_are_apart() -> None:
    whole = planned(SMOLLM2, cpus(1)).rows[0].weight_bytes
    mapped = planned(SMOLLM2, cpus(3), device_layers="0:10;1:10;2:10").rows
    assert sum(row.weight_bytes for row in mapped) == whole + 49152 * 576 * 4


def test_replicated_kv_heads_cost_memory_on_every_rank() -> None:
    eight, sixteen = (planned(QWEN3_32B, gpus(*[80] * count)).rows[0] for count in (8, 16))
    assert eight.kv_token_bytes == sixteen.kv_token_bytes == 2 * 64 * 128 * 2


def test_kv_bytes_follow_heads_layers_and_type() -> None:
    row = planned(QWEN3_32B, gpus(80, 80)).rows[0]
    assert row.kv_token_bytes == 2 * 64 * 4 * 128 * 2
    assert row.kv_tokens % 16 == 0
    assert row.weight_bytes + row.reserve_bytes + row.kv_bytes <= 0.9 * 80 * GIB
    assert row.weight_bytes + row.reserve_bytes + row.kv_bytes > 0.89 * 80 * GIB
    assert planned(SMOLLM2, cpus(1)).rows[0].kv_token_bytes == 2 * 30 * 3 * 64 * 4


def test_the_pool_is_the_least_over_the_ranks() -> None:
    result = planned(QWEN3_32B, gpus(141, 80))
    assert result.kv_tokens == result.rows[1].kv_tokens < result.rows[0].kv_tokens
    assert any("smallest bounds" in note for note in result.notes)


def test_requests_are_as_long_as_model_and_pool_allow() -> None:
    assert planned(QWEN3_32B, gpus(80, 80)).limits.max_seq_len == 40960
    tight = planned(QWEN3_32B, gpus(80))
    assert tight.limits.max_seq_len == tight.kv_tokens < 40960
    assert planned(QWEN3_32B, gpus(80, 80), max_seq_len=1000).limits.max_seq_len == 1000


def test_concurrency_at_full_context() -> None:
    result = planned(QWEN3_32B, gpus(80, 80), max_seq_len=10_000)
    assert result.concurrency == result.kv_tokens / 10_000


@pytest.mark.parametrize("length", [0, -5, 40961])
def test_lengths_beyond_the_context_are_refused(length: int) -> None:
    assert_has_all(refusal(QWEN3_32B, gpus(80), max_seq_len=length), str(length), "40960")


def test_a_length_that_does_not_fit_says_what_would() -> None:
    message = refusal(QWEN3_32B, gpus(80), max_seq_len=40960)
    possible = re.search(r"--max-seq-len (\d+) or less", message)
    assert possible is not None
    assert planned(QWEN3_32B, gpus(80), max_seq_len=int(possible[1])).limits.max_seq_len == int(possible[1])
    assert "2 GPUs of this size would hold it" in message


def test_a_cpu_without_enough_memory_is_refused() -> None:
    message = refusal(LLAMA_8B, cpus(1, gib_each=16))
    assert "16.0 GiB" not in message.split("needs")[1]
    assert "bfloat16" in message


def test_a_fixed_kv_pool_is_taken_as_it_is() -> None:
    result = planned(SMOLLM2, cpus(3), kv_memory=64 << 20)
    per_token = 2 * 30 * 1 * 64 * 4
    assert result.kv_tokens == (64 << 20) // per_token // 16 * 16
    assert result.kv_memory == result.kv_tokens * per_token
    assert "100.0 GiB of --kv-memory" in refusal(SMOLLM2, cpus(1), kv_memory=100 * GIB)


def test_workers_on_gpus_measure_their_pool_themselves() -> None:
    assert planned(QWEN3_32B, gpus(80, 80)).kv_memory == 0
    fixed = planned(QWEN3_32B, gpus(80, 80), kv_memory=4 * GIB)
    assert 0 < fixed.kv_memory <= 4 * GIB


def test_cpu_workers_take_a_modest_pool() -> None:
    for row in planned(SMOLLM2, cpus(3, gib_each=64)).rows:
        assert 1.9 * GIB < row.kv_bytes <= 2 * GIB
    for row in planned(SMOLLM2, cpus(3, gib_each=4)).rows:
        assert 0.9 * GIB < row.kv_bytes <= GIB
    uneven = planned(SMOLLM2, cpus(2, gib_each=64), device_layers="0:25;1:5")
    assert uneven.kv_memory == uneven.kv_tokens * uneven.rows[0].kv_token_bytes


@pytest.mark.parametrize(("machine", "options", "expected"), [
    (gpus(80, 80), LayoutOptions(), "bfloat16"),
    (gpus(80, 80), LayoutOptions(dtype="float16"), "float16"),
    (cpus(2), LayoutOptions(), "float32"),
    (cpus(2), LayoutOptions(dtype="bfloat16"), "bfloat16"),
])  # fmt: skip
def test_the_type_follows_the_device_unless_asked(machine: Machine, options: LayoutOptions, expected: str) -> None:
    assert plan(TINY, machine, options).layout.dtype == expected


def test_the_pool_is_never_larger_than_all_requests_could_use() -> None:
    result = planned(TINY, gpus(80), max_rows=4, max_seq_len=100, block_size=16)
    assert result.kv_tokens == 4 * 112


def test_what_others_hold_of_a_gpu_is_not_counted_twice() -> None:
    idle, busy = (planned(TINY, machine).rows[0] for machine in (gpus(80), gpus(60, total_gib=80)))
    assert idle.budget_bytes - busy.budget_bytes == 20 * GIB


def test_workers_that_share_a_gpu_are_planned_on_one_ordinal() -> None:
    result = planned(TINY, oversubscribed(gpus(80, 80), 4), device_layers="0+1:4;2+3:4")
    assert result.layout.placement.stages == (Stage(0, 4, (0, 1)), Stage(4, 8, (0, 1)))
    assert [row.budget_bytes for row in result.rows] == [36 * GIB] * 4


@pytest.mark.parametrize(("last", "logits"), [(True, 3 * 4 * 4 * 151936 // 2), (False, 0)])
def test_room_for_a_step_counts_every_activation_that_lives_at_once(last: bool, logits: int) -> None:
    queries_keys_values_and_output, gate_up_and_product = (64 + 8 + 8 + 64) * 128 // 2, 3 * 25600 // 2
    width = 4 * 5120 + queries_keys_values_and_output + gate_up_and_product
    assert step_bytes(QWEN3_32B, 2, last, 2, max_batch_tokens=100, max_rows=4) == 100 * width * 2 + logits
