"""The plan says which of LongRoPE's two sets of factors a server uses."""

import pytest

from harness.machines import cpus
from harness.specs import make_facts
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.protocol.model.attention_facts import RopeScaling

LONGROPE = RopeScaling((1.0,) * 64, 1.19, (2.0,) * 64, 4096)


@pytest.mark.parametrize(("max_seq_len", "said"), [(4096, "for short contexts"), (4097, "--max-seq-len 4096 uses")])
def test_the_longest_request_decides_on_the_factors(max_seq_len: int, said: str) -> None:
    facts = make_facts(layers=2, hidden=256, q=2, kv=2, width=512, vocab=1000, context=131072, rope_scaling=LONGROPE)
    result = plan(facts, cpus(1), LayoutOptions(max_seq_len=max_seq_len))
    assert [note for note in result.notes if said in note]
    assert not plan(make_facts(layers=2, vocab=1000), cpus(1), LayoutOptions(max_seq_len=64)).notes
