"""Plan models on machines, and the models that tests of plans name."""

from typing import Any

import pytest

from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.planner import LayoutOptions, Plan, plan
from mgpu.protocol.model.facts import ModelFacts

LLAMA_70B = make_facts(q=64, kv=8, layers=80, hidden=8192, width=28672, vocab=128256, context=131072)
LLAMA_8B = make_facts(q=32, kv=8, layers=32, hidden=4096, width=14336, vocab=128256, context=131072)
LLAMA2_7B = make_facts(q=32, kv=32, layers=32, hidden=4096, width=11008, vocab=32000, context=4096)
QWEN25_05B = make_facts(q=14, kv=2, layers=24, hidden=896, width=4864, head_dim=64, context=32768, tied=True)
QWEN25_7B = make_facts(q=28, kv=4, layers=28, hidden=3584, width=18944, vocab=152064, context=32768)
GEMMA3_270M = make_facts(
    q=4, kv=1, layers=18, hidden=640, width=2048, head_dim=256, vocab=262144, tied=True, architecture="gemma3"
)
ONE_HEAD = make_facts(q=1, kv=1, layers=6, hidden=64, width=128, head_dim=64, vocab=100, context=128)

NO_KV_CARE = LayoutOptions(max_seq_len=16)


def shape(result: Plan) -> str:
    """Write the stages the way -n does."""
    return ";".join(f"{'+'.join(map(str, s.devices))}:{s.num_layers}" for s in result.layout.placement.stages)


def planned(facts: ModelFacts, machine: Machine, **options: Any) -> Plan:
    return plan(facts, machine, LayoutOptions(**options))


def refusal(facts: ModelFacts, machine: Machine, **options: Any) -> str:
    with pytest.raises(PlacementError) as caught:
        planned(facts, machine, **options)
    return str(caught.value)


def outcome(facts: ModelFacts, machine: Machine) -> Plan | str:
    """Return the plan, or the text of the refusal."""
    try:
        return planned(facts, machine)
    except PlacementError as error:
        return str(error)
