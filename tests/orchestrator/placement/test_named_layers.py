"""Where a topology file puts layers, embedding and head, how it quantizes, and that a written file gives the same."""

import re
from dataclasses import replace
from typing import Any

import pytest

from harness.assertions import assert_has_all
from harness.machines import cpus, gpus
from harness.specs import make_facts
from mgpu.launch.pages.layout import narrow_layout
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import Machine, worker_environment
from mgpu.orchestrator.placement.planner import LayoutOptions, Plan, plan
from mgpu.orchestrator.placement.reports.speed import estimate_speed, speed_lines
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.orchestrator.placement.reports.written_topology import topology_text
from mgpu.orchestrator.placement.topology.file import parse_topology
from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import ModelFacts

FACTS = make_facts(q=32, kv=8, layers=32, hidden=4096, width=14336, vocab=128256, context=131072)
EXPERTS = make_facts(
    q=32, kv=4, layers=4, hidden=2048, width=6144, vocab=5000, context=4096,
    experts=ExpertFacts(8, 2, 768, (True, True, False, True), normalizes=True, shared_width=512),
)  # fmt: skip


def with_host(machine: Machine, gib: int = 256) -> Machine:
    return replace(machine, host_bytes=(gib << 30, gib << 30), shared_memory=True)


def planned(text: str, machine: Machine, facts: ModelFacts = FACTS, **options: Any) -> Plan:
    return plan(facts, machine, LayoutOptions(topology=parse_topology(text, "t.yaml"), **options))


def refusal(text: str, machine: Machine, facts: ModelFacts = FACTS, **options: Any) -> str:
    with pytest.raises(PlacementError) as caught:
        planned(text, machine, facts, **options)
    return str(caught.value)


def shape(result: Plan) -> str:
    stages = result.layout.placement.stages
    return ";".join(f"{'+'.join(map(str, s.devices))}:{s.first_layer}-{s.end_layer}" for s in stages)


TWO = '0-20: {device: "cuda[0]"}\n20-32: {device: "cuda[1]"}\n'


@pytest.mark.parametrize(("text", "machine", "expected"), [
    (TWO, gpus(80, 80), "0:0-20;1:20-32"),
    ('0-32: {device: "cuda[0]"}\n8-32: {device: "cuda[1]"}', gpus(80, 80), "0:0-8;1:8-32"),  # later ranges win
    ('0-32: {device: "cuda[1]"}', gpus(80, 80), "1:0-32"),
    ('0-20: {device: "cuda[0]"}', gpus(80, 80, nccl=False), "0:0-20;1:20-32"),  # the rest as automatic
    ("3: {quant: 8}", gpus(80, 80), "0+1:0-32"),
    ('0-16: {device: "cuda[0]+cuda[1]"}\n16-32: {device: "cuda[2]+cuda[3]"}', gpus(80, 80, 80, 80),
     "0+1:0-16;2+3:16-32"),
    ('/layers\\.(2\\d|3\\d)\\./: {device: "cuda[1]"}\n0-32: {device: "cuda[0]"}', gpus(80, 80), "0:0-20;1:20-32"),
    (TWO + '/lm_head/: {device: "cuda[0]"}', gpus(80, 80), "0:0-20;1:20-32;0:32-32"),
    (TWO + '/lm_head/: {device: "cuda[1]"}', gpus(80, 80), "0:0-20;1:20-32"),
    (TWO + '/embed/: {device: "cuda[2]"}', gpus(80, 80, 80), "2:0-0;0:0-20;1:20-32"),
    ('/embed/: {device: cpu}', with_host(gpus(80)), "1:0-0;0:0-32"),
    ('0-28: {device: "cuda[0]"}\n28-32: {device: cpu}', with_host(gpus(80)), "0:0-28;1:28-32"),
    ('0-28: {device: "cuda[0]"}\n28-32: {device: "cpu[0]+cpu[1]"}', with_host(gpus(80)), "0:0-28;1+2:28-32"),
    ('0-20: {device: "cpu[1]"}\n20-32: {device: "cpu[0]"}', cpus(2, 80), "1:0-20;0:20-32"),
])  # fmt: skip
def test_layers_go_where_the_file_says(text: str, machine: Machine, expected: str) -> None:
    result = planned(text, machine, max_seq_len=512)
    assert shape(result) == expected
    for page in (layout_text(result), narrow_layout(result), str(layout_json(result)), *speed_lines(result, None)):
        assert page
    estimate_speed(result)
    again = planned(topology_text(result, "heading"), machine, max_seq_len=512)
    assert (again.layout, again.facts, again.rows) == (result.layout, result.facts, result.rows)


@pytest.mark.parametrize(("text", "parts"), [
    ('0-33: {device: "cuda[0]"}', ["line 1, 0-33", "the model has 32 layers, 0 to 31", "0-32"]),
    ('32: {quant: 4}', ["the model has 32 layers"]),
    ('0-32: {device: "cuda[2]"}', ['"cuda[2]" is not visible', '"cuda[0]" to "cuda[1]"']),
    ('0-8: {device: "cuda[0]"}\n8-16: {device: "cuda[1]"}\n16-32: {device: "cuda[0]"}',
     ["device 0 would have the layers 0-8 and 16-32", "one range", "0-8: 0, 8-16: 1, 16-32: 0"]),
    ('0-4: {device: "cuda[1]"}', ["device 1 would have the layers 0-4 and"]),
    ('0-32: {device: "cpu"}', ["everything is on the CPU", "--device cpu"]),
    ('0-28: {device: "cuda[0]"}\n28-32: {device: "cpu[1]"}', ["cpu[1] is named without cpu[0]"]),
    ('0-32: {device: "cuda[0]+cpu"}', ["cannot be split over GPUs and CPU workers"]),
    ('/nothing/: {quant: 4}', ["no tensor matches", "lm_head.weight"]),
    ('/lm_head/: {quant: 4}', ["lm_head.weight is never quantized", "down_proj"]),
    ('/q_proj/: {quant: 4}', ["q_proj.weight and not", "k_proj.weight", "match all 3"]),
    ('/mlp.up_proj/: {quant: 4}', ["match all 2"]),
    ('/mlp/: {device: "cuda[1]"}', ["3 of the 9 tensors of layer 0", 'device: "cuda[1]"', "embedding and head"]),
    ('/model.norm/: {device: "cuda[1]"}', ["the final norm goes with the head"]),
])  # fmt: skip
def test_what_the_model_or_the_machine_lacks_is_refused(text: str, parts: list[str]) -> None:
    assert_has_all(refusal(text, gpus(80, 80, nccl=False)), "t.yaml", *parts)


def test_experts_without_their_layer_are_refused_with_what_can_be_on_the_cpu() -> None:
    with pytest.raises(PlacementError) as error:
        planned(r'/mlp\.experts\./: {device: "cpu"}', gpus(80), EXPERTS)
    assert_has_all(str(error.value), "24 of the", "tensors of layer 0, its experts alone", '3: {device: "cpu"}')
    whole = planned('3: {device: "cpu"}', with_host(gpus(80)), EXPERTS)
    assert shape(whole) == "0:0-3;1:3-4"


def test_a_stage_that_does_not_split_and_contradicting_options_are_refused() -> None:
    three = '0-32: {device: "cuda[0]+cuda[1]+cuda[2]"}'
    assert_has_all(refusal(three, gpus(80, 80, 80)), "3 devices cannot split", "compatible sizes: 1, 2, 4")
    assert_has_all(refusal(TWO, gpus(80, 80), tp=2), "--tp 2", "both say where layers go")
    assert_has_all(refusal(TWO, gpus(80, 80), device_layers="0:16;1:16"), '-n "0:16;1:16"', "both say")
    assert_has_all(refusal('0-32: {device: "cuda[0]"}', cpus(2)), "no GPU is visible", '"cpu[0]" to "cpu[1]"')
    assert shape(planned("0-8: {quant: 8}", gpus(80, 80), device_layers="0:16;1:16")) == "0:0-16;1:16-32"


def test_cpu_is_one_more_worker_also_where_there_are_no_gpus() -> None:
    result = planned('0-20: {device: "cpu[0]"}\n20-32: {device: cpu}', cpus(1, 80))
    assert (shape(result), len(result.machine.devices)) == ("0:0-20;1:20-32", 2)
    assert 'device: "cpu[1]"' in topology_text(result, "heading")


def test_formats_are_those_of_the_last_rule_and_patterns_win() -> None:
    result = planned("/layers\\.3\\..*down_proj/: {quant: none}\n0-16: {quant: 4}\n3-5: {quant: 8}", gpus(80, 80))
    names = [(each.qkv.quant, each.gate_up.quant, each.down.quant) for each in result.facts.formats]
    assert names[2:6] == [("4", "4", "4"), ("8", "8", "none"), ("8", "8", "8"), ("4", "4", "4")]
    assert names[16:] == [("none", "none", "none")] * 16
    line = "0-2 int4, groups of 32, 3 int8 (down: dense), 4 int8, 5-15 int4, groups of 32, 16-31 dense"
    assert f"formats by layer: {line}" in layout_text(result)
    again = planned(topology_text(result, "heading"), gpus(80, 80))
    assert (again.layout, again.facts, again.rows) == (result.layout, result.facts, result.rows)


def test_one_format_for_all_layers_is_that_of_quant() -> None:
    by_option = plan(FACTS, gpus(80, 80), LayoutOptions(quant="8"))
    by_file = planned(topology_text(by_option, "heading"), gpus(80, 80))
    assert (by_file.layout, by_file.facts, by_file.rows) == (by_option.layout, by_option.facts, by_option.rows)


def test_experts_and_shared_experts_have_formats_of_their_own() -> None:
    text = "/experts\\./: {quant: 8}\n/shared_expert\\./: {quant: 4}\n/layers\\.2\\.mlp/: {quant: fp8}"
    result = planned(text, gpus(80), EXPERTS)
    sparse, dense = result.facts.formats[0], result.facts.formats[2]
    assert (sparse.qkv.quant, sparse.gate_up.quant, sparse.down.quant) == ("none", "8", "8")
    assert (sparse.shared_gate_up.quant, sparse.shared_down.quant) == ("4", "4")
    assert (dense.gate_up.quant, dense.down.quant) == ("fp8", "fp8")
    again = planned(topology_text(result, "heading"), gpus(80), EXPERTS)
    assert [layer.gate_up for layer in again.facts.formats] == [layer.gate_up for layer in result.facts.formats]


# CPU workers beside GPUs


def mapped(text: str, machine: Machine, **options: Any) -> Plan:
    return plan(FACTS, machine, LayoutOptions(device_layers=text, **options))


def test_the_last_layers_go_to_the_cpu_and_the_plan_says_what_that_costs() -> None:
    result = mapped("0:28;cpu:4", with_host(gpus(24)))
    assert shape(result) == "0:0-28;1:28-32"
    assert (result.layout.transport, result.layout.stage_transport) == ("none", "pinned")
    assert (result.layout.cpu_ranks, result.layout.staged) == ((1,), ((0, 1),))
    assert worker_environment(result.machine, 1) == ({"CUDA_VISIBLE_DEVICES": ""}, "cpu")
    assert worker_environment(result.machine, 0)[0]["CUDA_VISIBLE_DEVICES"] == "GPU-0000"
    text = layout_text(result)
    assert_has_all(text, "layer-mapped over 1 GPU and 1 CPU worker", "CPU worker 0", "layers 28 to 31 on the CPU")
    assert "no peer access" not in text
    assert result.limits.max_batch_tokens == 512  # as many as a CPU worker computes in good time
    assert result.rows[1].kv_tokens > 1_000_000  # a small pool there would bound that of the GPU


def test_gpus_keep_their_own_sums_and_direct_boundaries_beside_a_cpu_worker() -> None:
    result = mapped("0+1:14;2:14;cpu:4", with_host(gpus(24, 24, 24)))
    assert (result.layout.transport, result.layout.stage_transport) == ("gloo", "peer")
    assert result.layout.staged == ((2, 3),)
    assert "NCCL connects GPUs only" in layout_text(result)
    workers = mapped("0:28;cpu+cpu:4", with_host(gpus(24)))
    assert (workers.layout.transport, workers.layout.cpu_ranks) == ("none", (1, 2))


@pytest.mark.parametrize(("text", "parts"), [
    ("cpu:32", ["everything is on the CPU", "--device cpu"]),
    ("0+cpu:32", ["cannot be split over GPUs and CPU workers"]),
    ("0:28;cpu:5", ["add up to 33", 'for example -n "0:28;cpu:4"']),
    ("0:28;CPU:4", ["'CPU:4' is not an ordinal:count pair"]),
    ("0:28;cpu0:4", ["is not an ordinal:count pair"]),
    ("0:32;cpu:0", ["gets 0 layers"]),
])  # fmt: skip
def test_maps_that_name_the_cpu_wrongly_are_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(PlacementError) as caught:
        mapped(text, with_host(gpus(24)))
    assert_has_all(str(caught.value), *parts)


def test_a_machine_without_room_for_the_cpu_layers_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"CPU worker 0 has 0.9 GiB to use"):
        mapped("0:28;cpu:4", with_host(gpus(24), gib=1))


def test_a_model_that_is_too_big_is_offered_its_last_layers_on_the_cpu() -> None:
    with pytest.raises(PlacementError) as caught:
        plan(FACTS, with_host(gpus(14)), LayoutOptions(max_seq_len=4096))
    found = re.search(r'-n "(0:\d+;cpu:\d+)" would run its last layers on the CPU', str(caught.value))
    assert found is not None
    placed = mapped(found[1], with_host(gpus(14)), max_seq_len=4096)
    layers = placed.layout.placement.stages[0].num_layers
    assert placed.kv_tokens >= 4096
    with pytest.raises(PlacementError):
        mapped(f"0:{layers + 1};cpu:{31 - layers}", with_host(gpus(14)), max_seq_len=4096)
    with pytest.raises(PlacementError) as caught:
        plan(FACTS, with_host(gpus(14), gib=1), LayoutOptions(max_seq_len=4096))
    assert "on the CPU" not in str(caught.value)


@pytest.mark.parametrize("query_rank", [0, 256])
def test_projections_of_latents_have_formats_of_their_own(query_rank: int) -> None:
    facts = replace(EXPERTS, num_kv_heads=1, head_dim=288, latent=LatentFacts(256, 32, 96, 128, query_rank))
    text = "/(q_a_proj|q_proj|kv_a_proj_with_mqa)/: {quant: 8}\n/o_proj/: {quant: 4}"
    result = planned(text + "\n/q_b_proj/: {quant: fp8}" * bool(query_rank), gpus(80, 80), facts)
    formats = result.facts.formats[0]
    assert (formats.qkv.quant, formats.out.quant) == ("8", "4")
    assert formats.q_b.quant == ("fp8" if query_rank else "none")
    again = planned(topology_text(result, "heading"), gpus(80, 80), facts)
    assert again.rows == result.rows
    assert "kv_b_proj.weight is never quantized" in refusal("/kv_b_proj/: {quant: 8}", gpus(80), facts)
