"""Plans of models that transformers' code runs."""

from dataclasses import replace

import pytest

from harness.machines import gpus
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.split.sizes import layers_bytes
from mgpu.protocol.model.facts import BorrowedCode, ModelFacts

MACHINE = gpus(80, 80)


def borrowed(can_split: bool) -> ModelFacts:
    facts = make_facts(layers=4, architecture="stablelm")
    return replace(facts, borrowed=BorrowedCode((1000, 1000, 1001, 3000), can_split))


def test_layers_take_what_the_files_hold() -> None:
    assert layers_bytes(borrowed(True), range(1, 3), 2, 2, "none") == 2 * (500 + 501)


def test_a_family_that_cannot_be_split_is_refused_with_the_way_out() -> None:
    with pytest.raises(PlacementError, match=r"transformers has no plan to split stablelm.*Use --tp 1.*-n "):
        plan(borrowed(False), MACHINE, LayoutOptions(tp=2))
    planned = plan(borrowed(False), MACHINE, LayoutOptions())
    assert planned.mode == "layer-mapped"
    assert "transformers has no plan to split stablelm" in planned.reason


def test_the_plan_says_whose_code_runs_and_refuses_quantization() -> None:
    notes = plan(borrowed(True), MACHINE, LayoutOptions()).notes
    assert any("through transformers' modelling code" in note for note in notes)
    with pytest.raises(PlacementError, match="--quant 8: not tested with transformers' code"):
        plan(borrowed(True), MACHINE, LayoutOptions(quant="8"))
