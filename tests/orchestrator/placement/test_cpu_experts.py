"""Experts on the CPU whose layers are on GPUs: what the plan holds where, what it costs, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from harness.assertions import assert_has_all
from harness.machines import cpus, gpus
from harness.specs import make_facts
from mgpu.launch.pages.layout import narrow_layout
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.planner import LayoutOptions, Plan, plan
from mgpu.orchestrator.placement.reports.speed import estimate_speed
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.orchestrator.placement.reports.written_topology import topology_text
from mgpu.orchestrator.placement.topology.file import parse_topology
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.weight_format import LayerFormats, WeightFormat

SPARSE = make_facts(
    q=32, kv=4, layers=8, hidden=2048, width=6144, vocab=5000, context=4096,
    experts=ExpertFacts(16, 2, 768, (True,) * 7 + (False,), normalizes=True, shared_width=512),
)  # fmt: skip
DENSE = make_facts(q=32, kv=8, layers=8, hidden=4096, width=14336, vocab=5000, context=4096)
LAYER_BYTES = 16 * 3 * 2048 * 768 * 2
"""Of the experts of one layer in bfloat16."""


def with_host(machine: Machine, gib: float = 64) -> Machine:
    return replace(machine, host_bytes=(int(gib * 2**30), int(gib * 2**30)), shared_memory=True)


def planned(text: str, machine: Machine, facts: ModelFacts = SPARSE, **options: Any) -> Plan:
    return plan(facts, machine, LayoutOptions(topology=parse_topology(text, "t.yaml"), **options))


def refusal(text: str, machine: Machine, facts: ModelFacts = SPARSE, **options: Any) -> str:
    with pytest.raises(PlacementError) as caught:
        planned(text, machine, facts, **options)
    return str(caught.value)


def test_experts_count_for_the_host_and_not_for_the_gpu() -> None:
    whole = plan(SPARSE, with_host(gpus(80)), LayoutOptions())
    some = planned("2-5: {experts: cpu}", with_host(gpus(80)))
    assert some.layout.cpu_experts == (2, 3, 4)
    assert (some.layout.placement, some.mode) == (whole.layout.placement, "single")
    assert some.rows[0].host_bytes == 3 * LAYER_BYTES
    assert whole.rows[0].weight_bytes - some.rows[0].weight_bytes == some.rows[0].host_bytes
    assert some.limits.max_batch_tokens == 512
    text = layout_text(some)
    assert_has_all(text, "layers 2 to 4, 0.4 GiB of rank 0", "experts of layers 2 to 4 on the CPU", "assumed 100 GB/s",
                   "54.0 MiB of them", "no CUDA graphs", "without their layers: layers 2 to 4")  # fmt: skip
    assert narrow_layout(some)
    ranks: Any = layout_json(some)["ranks"]
    assert ranks[0]["host_weight_bytes"] == 3 * LAYER_BYTES


@pytest.mark.parametrize("options", [
    {}, {"tp": 2}, {"device_layers": "0:3;1:5"}, {"device_layers": "0+1:8", "experts": "parallel"}, {"quant": "4"},
])  # fmt: skip
def test_the_written_file_gives_the_same_layout(options: dict[str, Any]) -> None:
    result = planned("0-2: {experts: cpu}\n4: {experts: cpu, quant: 8}", with_host(gpus(80, 80)), **options)
    assert result.layout.cpu_experts == (0, 1, 4)
    kept = {name: value for name, value in options.items() if name == "experts"}
    again = planned(topology_text(result, "heading"), with_host(gpus(80, 80)), **kept)
    assert (again.layout, again.facts, again.rows) == (result.layout, result.facts, result.rows)
    assert estimate_speed(result) is not None or result.facts.formats


def test_what_the_kernels_for_the_cpu_take_stays_in_cuda_graphs() -> None:
    box = replace(with_host(h200()), has_compiler=True)
    said = [layout_text(planned("0-7: {experts: cpu}", box, **each)) for each in ({}, {"quant": "4"})]
    assert all("calls the processor, also in CUDA graphs" in text for text in said)
    for options in ({"dtype": "float32"}, {"quant": "fp8"}):
        assert "no CUDA graphs" in layout_text(planned("0-7: {experts: cpu}", box, **options))

    def rate(machine: Machine) -> float:
        speed = estimate_speed(planned("6: {experts: cpu}", machine))
        assert speed is not None
        return speed.one_stream

    assert rate(box) > 1.3 * rate(with_host(h200()))


def test_experts_of_a_quantized_checkpoint_stay_so_in_the_written_file() -> None:
    mxfp4 = WeightFormat("fp4", 32, scale_bytes=1, source="MXFP4")
    facts = replace(SPARSE, formats=(LayerFormats(gate_up=mxfp4, down=mxfp4),) * 7 + (LayerFormats(),))
    result = planned("0-8: {experts: cpu}", with_host(gpus(80)), facts)
    assert result.rows[0].host_bytes < 0.3 * 7 * LAYER_BYTES
    again = planned(topology_text(result, "heading"), with_host(gpus(80)), facts)
    assert (again.layout, again.facts, again.rows) == (result.layout, result.facts, result.rows)


def test_each_rank_keeps_its_share_and_all_layers_may_be_named_where_some_are_dense() -> None:
    result = planned("0-8: {experts: cpu}", with_host(gpus(80, 80)), tp=2)
    assert result.layout.cpu_experts == tuple(range(7))
    assert [row.host_bytes for row in result.rows] == [7 * LAYER_BYTES // 2] * 2
    assert "experts of layers 0 to 6 on the CPU: 2.0 GiB" not in layout_text(result)
    mapped = planned("2-4: {experts: cpu}", with_host(gpus(80, 80)), device_layers="0:3;1:5")
    assert [row.host_bytes for row in mapped.rows] == [LAYER_BYTES] * 2
    assert mapped.layout.cpu_experts_of(0) == (2,)


def test_on_the_cpu_everything_stays_in_the_memory_of_the_worker() -> None:
    result = planned("0-4: {experts: cpu}", cpus(1, 80))
    plain = plan(SPARSE, cpus(1, 80), LayoutOptions())
    assert result.layout.cpu_experts == (0, 1, 2, 3)
    assert result.rows == plain.rows
    again = planned(topology_text(result, "heading"), cpus(1, 80))
    assert again.layout == result.layout


def test_a_slower_estimate_says_what_experts_on_the_cpu_cost() -> None:
    def rate(text: str) -> float:
        speed = estimate_speed(planned(text, with_host(h200())))
        assert speed is not None
        return speed.one_stream

    assert rate("0-7: {experts: cpu}") < 0.8 * rate("0: {experts: cpu}") < 0.5 * rate("0: {quant: none}")


def h200() -> Machine:
    machine = gpus(140)
    return replace(machine, devices=tuple(replace(each, name="NVIDIA H200") for each in machine.devices))


@pytest.mark.parametrize(("text", "facts", "parts"), [
    ("6-8: {experts: cpu}", DENSE, ["line 1, 6-8", "no experts", "7: {device: cpu}"]),
    ("6-9: {experts: cpu}", SPARSE, ["8 layers, 0 to 7", "0-8"]),
    ("7: {experts: cpu}", SPARSE, ["no layer of these has experts", "layers with experts: 0-7"]),
    ("0-4: {experts: cpu}\n3-5: {experts: cpu}", SPARSE, ["line 2", "layer 3 are on the CPU already, by line 1"]),
    ('6-8: {device: cpu}\n4-8: {experts: cpu}', SPARSE, ["layer 6 is on the CPU as a whole", "6-8"]),
    (r"/mlp\.experts\./: {device: cpu}", SPARSE, ["48 of the", "its experts alone", "0-8: {experts: cpu}"]),
])  # fmt: skip
def test_wrong_places_are_refused_with_the_way_out(text: str, facts: ModelFacts, parts: list[str]) -> None:
    assert_has_all(refusal(text, with_host(gpus(80)), facts), "t.yaml", *parts)


def test_too_little_memory_of_the_machine_is_refused_with_numbers() -> None:
    text = refusal("0-8: {experts: cpu}", with_host(gpus(80), gib=0.5))
    numbers = "experts of 7 layers on the CPU need 1.0 GiB", "0.4 GiB can be used", "0.5 GiB free of 0.5 GiB"
    assert_has_all(text, *numbers, "3 of these layers would fit", "--quant 4 would make them fit")
    beside = "0-4: {experts: cpu}\n6-8: {device: cpu}"
    assert "beside the" in refusal(beside, with_host(gpus(80), gib=0.8))


def test_a_model_that_does_not_fit_is_told_how_many_layers_of_experts_to_move() -> None:
    facts = replace(SPARSE, experts=replace(SPARSE.experts, width=16384)) if SPARSE.experts else SPARSE
    with pytest.raises(PlacementError) as error:
        plan(facts, with_host(gpus(16)), LayoutOptions())
    assert_has_all(str(error.value), "does not fit", '"4-7: {experts: cpu}"')
    fits = planned("4-7: {experts: cpu}", with_host(gpus(16)), facts)
    assert fits.layout.cpu_experts == (4, 5, 6)
    assert "does not fit" in refusal("5-7: {experts: cpu}", with_host(gpus(16)), facts)
