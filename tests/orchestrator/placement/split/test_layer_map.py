"""Layers over stages without a typed map: as even as whole layers allow, by memory and by time."""

import itertools

import pytest

from harness.machines import QWEN3_32B, SMOLLM2, TINY, gpus
from harness.planning import GEMMA3_270M, LLAMA_70B, NO_KV_CARE, planned
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.planner import plan
from mgpu.protocol.model.facts import ModelFacts


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize(
    "facts", [QWEN3_32B, LLAMA_70B, SMOLLM2, GEMMA3_270M, TINY], ids=lambda facts: str(facts.vocab_size)
)
def test_equal_gpus_are_filled_as_evenly_as_whole_layers_allow(facts: ModelFacts, count: int) -> None:
    result = plan(facts, gpus(*[80] * count, nccl=False), NO_KV_CARE)
    stages = result.layout.placement.stages
    assert [stage.devices for stage in stages] == [(device,) for device in range(count)]
    assert stages[0].first_layer == 0
    assert stages[-1].end_layer == facts.num_layers
    assert all(before.end_layer == after.first_layer for before, after in itertools.pairwise(stages))
    assert all(stage.num_layers >= 1 for stage in stages)


def best_fullness(facts: ModelFacts, machine: Machine) -> float:
    """Try every division of the layers."""
    count, layers = len(machine.devices), facts.num_layers
    return min(
        fullness(facts, machine, [b - a for a, b in itertools.pairwise([0, *cuts, layers])])
        for cuts in itertools.combinations(range(1, layers), count - 1)
    )


def fullness(facts: ModelFacts, machine: Machine, counts: list[int]) -> float:
    text = ";".join(f"{device}:{count}" for device, count in enumerate(counts))
    rows = planned(facts, machine, device_layers=text, max_seq_len=16).rows
    return max(row.weight_bytes / (row.budget_bytes - (700 << 20)) for row in rows)


@pytest.mark.parametrize("free", [(12, 4), (4, 12), (16, 4, 8), (4, 4, 16, 8)])
@pytest.mark.parametrize("facts", [GEMMA3_270M, TINY], ids=["gemma", "tiny"])
def test_no_other_division_has_a_less_full_fullest_gpu(facts: ModelFacts, free: tuple[float, ...]) -> None:
    machine = gpus(*free, nccl=False)
    counts = [stage.num_layers for stage in plan(facts, machine, NO_KV_CARE).layout.placement.stages]
    assert fullness(facts, machine, counts) == pytest.approx(best_fullness(facts, machine))


def test_unequal_gpus_get_layers_by_their_free_memory() -> None:
    stages = planned(QWEN3_32B, gpus(141, 80, nccl=False)).layout.placement.stages
    assert 1.6 < stages[0].num_layers / stages[1].num_layers < 1.9
    busy = planned(QWEN3_32B, gpus(80, 40, nccl=False, total_gib=80)).layout.placement.stages
    assert busy[0].num_layers > 1.5 * busy[1].num_layers


def test_the_head_costs_the_last_stage_time_but_the_embedding_costs_the_first_none() -> None:
    counts = [
        stage.num_layers for stage in plan(GEMMA3_270M, gpus(8, 8, 8, nccl=False), NO_KV_CARE).layout.placement.stages
    ]
    assert min(counts[:2]) > counts[2]
