"""The layout of every model on every machine: the demo, the selection table, and every combination."""

import re

import pytest

from harness.assertions import assert_has_all
from harness.machines import QWEN3_32B, SMOLLM2, TINY, cpus, gpus
from harness.planning import GEMMA3_270M, LLAMA_8B, NO_KV_CARE, ONE_HEAD, QWEN25_05B, outcome, planned, refusal, shape
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.planner import plan
from mgpu.orchestrator.placement.split.divisibility import compatible_sizes
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import Mode, PlacementPlan

# The demo, which takes the devices that it splits over


@pytest.mark.parametrize(("count", "stages"), [
    (1, "0:30"), (2, "0:30"), (3, "0+1+2:30"), (4, "0+1+2:30"), (5, "0+1+2:30"), (8, "0+1+2:30"),
    (9, "0+1+2+3+4+5+6+7+8:30"), (16, "0+1+2+3+4+5+6+7+8:30"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_demo_takes_the_most_devices_that_it_splits_over(count: int, stages: str, kind: str) -> None:
    machine = gpus(*[80.0] * count) if kind == "gpu" else cpus(count)
    result = planned(SMOLLM2, machine, fewer_devices=True)
    assert shape(result) == stages
    if result.layout.placement.world_size < count:
        assert_has_all(result.reason, f" of {count}, because 9 query heads and 3 KV heads do not split", "1, 3, 9")
        assert "not used" in result.notes[-1]


def test_the_demo_takes_the_emptiest_devices() -> None:
    assert shape(planned(SMOLLM2, gpus(4, 80, 80, 4, 80, total_gib=80), fewer_devices=True)) == "1+2+4:30"
    assert planned(SMOLLM2, gpus(4, 80, total_gib=80), fewer_devices=True).reason.startswith("GPU 1 of 2, because")


@pytest.mark.parametrize("count", [2, 3, 4, 8, 30])
def test_the_demo_maps_layers_to_all_devices_where_nccl_is_missing(count: int) -> None:
    result = planned(SMOLLM2, gpus(*[80.0] * count, nccl=False), fewer_devices=True)
    assert result.layout.placement.num_stages == count


def test_the_demo_leaves_devices_out_where_layers_are_too_few() -> None:
    result = planned(SMOLLM2, gpus(4, *[80.0] * 31, total_gib=80, nccl=False), fewer_devices=True)
    assert result.layout.placement.num_stages == 30
    assert_has_all(result.reason, "30 of 32 GPUs", "30 layers")
    assert result.notes[-1] == "not used: GPUs 0, 31"


def test_a_size_typed_for_the_demo_is_not_lowered() -> None:
    assert_has_all(refusal(SMOLLM2, gpus(80, 80), tp=2, fewer_devices=True), "9 query heads % 2 = 1", "1, 3, 9")


# The selection table


@pytest.mark.parametrize(("facts", "machine", "mode", "layout"), [
    (QWEN3_32B, gpus(80), "single", "0:64"),
    (QWEN3_32B, gpus(80, nccl=False), "single", "0:64"),
    (QWEN3_32B, gpus(80, 80), "tensor-parallel", "0+1:64"),
    (QWEN3_32B, gpus(*[80] * 4), "tensor-parallel", "0+1+2+3:64"),
    (QWEN3_32B, gpus(*[80] * 8), "tensor-parallel", "0+1+2+3+4+5+6+7:64"),
    (QWEN3_32B, gpus(80, 80, nccl=False), "layer-mapped", "0:33;1:31"),
    (QWEN3_32B, gpus(80, 80, 80, nccl=False), "layer-mapped", "0:22;1:22;2:20"),
    (ONE_HEAD, gpus(8, 8), "layer-mapped", "0:3;1:3"),
    (ONE_HEAD, cpus(2), "layer-mapped", "0:3;1:3"),
    (SMOLLM2, cpus(1), "cpu", "0:30"),
    (SMOLLM2, cpus(3), "tensor-parallel", "0+1+2:30"),
    (GEMMA3_270M, cpus(2), "tensor-parallel", "0+1:18"),
    (GEMMA3_270M, cpus(4), "tensor-parallel", "0+1+2+3:18"),
])  # fmt: skip
def test_default_selection(facts: ModelFacts, machine: Machine, mode: Mode, layout: str) -> None:
    result = plan(facts, machine, NO_KV_CARE)
    assert (result.mode, shape(result)) == (mode, layout)


@pytest.mark.parametrize(
    ("count", "outcome"),
    [(1, "single"), (2, "split"), (3, "refused"), (4, "split"), (6, "refused"), (8, "split"), (16, "replicated")],
)
def test_qwen3_32b_on_any_number_of_gpus(count: int, outcome: str) -> None:
    machine = gpus(*[80] * count)
    if outcome == "refused":
        message = refusal(QWEN3_32B, machine)
        assert_has_all(message, f"{count} GPUs", "64 query heads", "8 KV heads", "1, 2, 4, 8, 16, 32, 64")
        best = 2 if count == 3 else 4
        assert_has_all(message, f"CUDA_VISIBLE_DEVICES={','.join(map(str, range(best)))} ", f"--tp {best}")
        return
    result = planned(QWEN3_32B, machine)
    assert result.mode == ("single" if outcome == "single" else "tensor-parallel")
    assert [row.heads.num_q for row in result.rows] == [64 // count] * count
    assert [row.heads.num_kv for row in result.rows] == [max(1, 8 // count)] * count
    assert [row.heads.kv_replicas for row in result.rows] == [2 if count == 16 else 1] * count
    if count == 16:
        assert [row.heads.kv_start for row in result.rows] == [rank // 2 for rank in range(16)]


@pytest.mark.parametrize(("facts", "machine", "reason"), [
    (QWEN3_32B, gpus(80), "one GPU"),
    (QWEN3_32B, gpus(80, 80), "NCCL is usable and 64 query heads, 8 KV heads"),
    (QWEN3_32B, gpus(80, 80, nccl=False), "MGPU_NO_NCCL=1"),
    (ONE_HEAD, gpus(8, 8), "no tensor-parallel size above 1"),
    (SMOLLM2, cpus(1), "one CPU worker"),
    (SMOLLM2, cpus(3), "9 query heads, 3 KV heads"),
])  # fmt: skip
def test_the_reason_says_why(facts: ModelFacts, machine: Machine, reason: str) -> None:
    assert reason in plan(facts, machine, NO_KV_CARE).reason


# Every combination


@pytest.mark.parametrize("nccl", [True, False])
@pytest.mark.parametrize("count", range(1, 17))
@pytest.mark.parametrize(
    "facts", [QWEN3_32B, LLAMA_8B, QWEN25_05B, SMOLLM2, GEMMA3_270M, TINY, ONE_HEAD], ids=lambda f: f"{f.num_q_heads}q"
)
def test_any_machine_gives_a_whole_valid_plan_or_an_error(facts: ModelFacts, count: int, nccl: bool) -> None:
    machine = gpus(*[80] * count, nccl=nccl)
    result = outcome(facts, machine)
    if isinstance(result, str):
        assert_has_all(result, str(count), "CUDA_VISIBLE_DEVICES=")
        return
    placement = result.layout.placement
    assert placement.world_size == count == len(result.rows)
    assert sum(stage.num_layers for stage in placement.stages) == facts.num_layers
    assert sorted(device for stage in placement.stages for device in stage.devices) == list(range(count))
    for stage in placement.stages:
        assert len(stage.devices) in compatible_sizes(facts)
    for row in result.rows:
        assert row.device.ordinal == placement.place_of(row.rank).device
        assert row.heads.num_q * (len(placement.stages[row.stage_index].devices)) == facts.num_q_heads
    assert result.kv_tokens >= result.limits.max_seq_len > 0


def test_the_printed_way_out_of_every_refusal_works() -> None:
    for count in range(2, 33):
        result = outcome(QWEN3_32B, gpus(*[80] * count))
        if isinstance(result, str):
            match = re.search(r"CUDA_VISIBLE_DEVICES=([0-9,]+)", result)
            assert match is not None
            fitting = len(match[1].split(","))
            assert planned(QWEN3_32B, gpus(*[80] * fitting)).layout.placement.world_size == fitting
            assert planned(QWEN3_32B, gpus(*[80] * count), tp=fitting).layout.placement.world_size == fitting


def test_a_plan_is_a_pure_function() -> None:
    assert planned(QWEN3_32B, gpus(80, 80)) == planned(QWEN3_32B, gpus(80, 80))
    assert isinstance(planned(TINY, cpus(2)).layout.placement, PlacementPlan)
