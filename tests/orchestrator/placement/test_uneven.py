"""Unequal shares of the heads: how they are placed, counted and shown, and every refusal."""

from dataclasses import replace
from typing import Any

import pytest

from harness.assertions import assert_has_all
from harness.machines import QWEN3_32B, SMOLLM2, cpus, gpus
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.planner import LayoutOptions, Plan, plan
from mgpu.orchestrator.placement.reports.speed import estimate_speed
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.orchestrator.placement.reports.written_topology import topology_text
from mgpu.orchestrator.placement.split.sizes import layers_bytes
from mgpu.orchestrator.placement.topology.file import parse_topology
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import BorrowedCode, ModelFacts

LLAMA_8B = make_facts(q=32, kv=8, layers=32, hidden=4096, width=14336, vocab=128256, context=131072)
EXPERTS = make_facts(
    q=32, kv=8, layers=4, hidden=2048, width=6144, vocab=5000, context=4096,
    experts=ExpertFacts(64, 8, 768, (True,) * 4, normalizes=True),
)  # fmt: skip


def planned(shares: str, machine: Machine, facts: ModelFacts = LLAMA_8B, **options: Any) -> Plan:
    return plan(facts, machine, LayoutOptions(tp_shares=shares, **options))


def test_each_rank_has_its_share_of_heads_columns_and_vocabulary() -> None:
    result = planned("3,3, 2", gpus(80, 80, 60))
    stage = result.layout.placement.stages[0]
    assert (stage.devices, stage.shares, result.mode) == ((0, 1, 2), (3, 3, 2), "tensor-parallel")
    assert [(row.heads.num_q, row.heads.num_kv, row.heads.kv_start) for row in result.rows] == [
        (12, 3, 0), (12, 3, 3), (8, 2, 6),
    ]  # fmt: skip
    assert [row.kv_token_bytes for row in result.rows] == [3 * 32 * 512, 3 * 32 * 512, 2 * 32 * 512]
    whole = layers_bytes(LLAMA_8B, range(32), 1, 2, "none") + 2 * 128256 * 4096 * 2
    assert sum(row.weight_bytes for row in result.rows) == pytest.approx(whole, rel=1e-3)
    assert result.rows[2].weight_bytes == pytest.approx(whole / 4, rel=0.01)
    line = "shares 3 + 3 + 2 of 8 KV heads: MLP columns 5376 + 5376 + 3584, vocabulary 48096 + 48096 + 32064"
    assert_has_all(layout_text(result), "--tp-shares 3,3, 2", line, "own [6, 8)")
    assert layout_json(result)["stages"] == [{"layers": [0, 32], "devices": [0, 1, 2], "shares": [3, 3, 2]}]
    assert planned("3,3,2", gpus(80, 80, 60), tp=3).layout == result.layout


def test_equal_shares_are_those_of_tp() -> None:
    assert planned("4,4", gpus(80, 80)).layout == plan(LLAMA_8B, gpus(80, 80), LayoutOptions(tp=2)).layout


def test_a_weaker_rank_bounds_the_speed_less_with_a_smaller_share() -> None:
    machine = gpus(80, 80)
    machine = replace(machine, devices=tuple(replace(each, name="NVIDIA H200") for each in machine.devices))
    even, uneven = estimate_speed(planned("4,4", machine)), estimate_speed(planned("6,2", machine))
    assert even is not None
    assert uneven is not None
    assert uneven.one_stream < even.one_stream


def test_experts_are_cut_by_shares_too() -> None:
    sliced = planned("5,3", gpus(80, 80), EXPERTS)
    whole = planned("5,3", gpus(80, 80), EXPERTS, experts="parallel")
    for result in (sliced, whole):
        assert result.rows[0].weight_bytes / result.rows[1].weight_bytes == pytest.approx(5 / 3, rel=0.05)


@pytest.mark.parametrize(("shares", "options", "parts"), [
    ("3,3,3", {}, ["the shares add up to 9", "8 KV heads", "--tp-shares 3,3,2"]),
    ("1,1,1,1,1,1,1,1,1", {}, ["add up to 9", "at most 8 GPUs can share them"]),
    ("8,0", {}, ["at least 1 of the 8 KV heads"]),
    ("5;3", {}, ["separated by commas", "such as 3,3,2"]),
    ("5,3,", {}, ["separated by commas"]),
    ("-5,13", {}, ["separated by commas"]),
    ("5.0,3", {}, ["separated by commas"]),
    ("\uff15,3", {}, ["separated by commas"]),
    ("a", {}, ["separated by commas"]),
    ("2,2,2,2", {}, ["4 shares, and 3 devices can be used", "at most 3"]),
    ("5,3", {"tp": 3}, ["2 shares, and --tp 3"]),
    ("5,3", {"device_layers": "0:16;1:16"}, ['-n "0:16;1:16" says already']),
    ("5,3", {"topology": parse_topology("0-32: {device: cpu}", "t.yaml")}, ["t.yaml says already"]),
])  # fmt: skip
def test_wrong_shares_are_refused_with_the_way_out(shares: str, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(PlacementError) as caught:
        planned(shares, gpus(80, 80, 80), **options)
    assert_has_all(str(caught.value), "--tp-shares", *parts)


def test_shares_that_cut_groups_or_that_borrowed_code_cannot_have_are_refused() -> None:
    narrow = make_facts(q=6, kv=3, layers=2, hidden=64, width=128, head_dim=8, vocab=100, context=256)
    with pytest.raises(PlacementError, match="16 columns of the attention output, not a multiple of 32"):
        planned("2,1", cpus(2), narrow, quant="4")
    with pytest.raises(PlacementError, match=r"MLP width 24 is too narrow: 0 \+ 24 in steps of 32"):
        planned("2,1", cpus(2), replace(narrow, head_dim=16, intermediate_size=24), quant="4")
    with pytest.raises(PlacementError, match="not a multiple of 32"):
        planned("1,1,1", cpus(3), narrow, quant="4")
    with pytest.raises(PlacementError, match="splits evenly only"):
        planned("2,1", cpus(2), replace(narrow, borrowed=BorrowedCode((), True)))


def test_sizes_that_do_not_divide_are_refused_by_default_and_shares_are_named() -> None:
    with pytest.raises(PlacementError) as caught:
        plan(QWEN3_32B, gpus(80, 80, 80), LayoutOptions())
    assert_has_all(str(caught.value), "3 GPUs cannot split", "or --tp-shares 3,3,2")
    with pytest.raises(PlacementError) as caught:
        plan(SMOLLM2, cpus(4), LayoutOptions())
    assert "--tp-shares" not in str(caught.value)


def test_a_topology_file_has_no_shares() -> None:
    with pytest.raises(PlacementError, match="no shares"):
        topology_text(planned("5,3", gpus(80, 80)), "heading")
