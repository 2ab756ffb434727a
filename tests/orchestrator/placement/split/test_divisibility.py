"""The tensor-parallel sizes that a model allows."""

import pytest

from harness.machines import QWEN3_32B, SMOLLM2
from harness.planning import GEMMA3_270M, LLAMA2_7B, LLAMA_8B, LLAMA_70B, ONE_HEAD, QWEN25_05B, QWEN25_7B
from harness.specs import make_facts
from mgpu.orchestrator.placement.split.divisibility import compatible_sizes
from mgpu.protocol.model.facts import ModelFacts


@pytest.mark.parametrize(("facts", "sizes"), [
    (QWEN3_32B, (1, 2, 4, 8, 16, 32, 64)),
    (LLAMA_70B, (1, 2, 4, 8, 16, 32, 64)),
    (LLAMA_8B, (1, 2, 4, 8, 16, 32)),
    (LLAMA2_7B, (1, 2, 4, 8, 16, 32)),
    (QWEN25_05B, (1, 2, 14)),  # 7 ranks do not share 2 KV heads; 14 shares of the MLP differ by a column
    (QWEN25_7B, (1, 2, 4, 28)),
    (SMOLLM2, (1, 3, 9)),
    (GEMMA3_270M, (1, 2, 4)),
    (ONE_HEAD, (1,)),
    (make_facts(q=6, kv=6, width=6 * 64), (1, 2, 3, 6)),
    (make_facts(q=12, kv=4, width=12 * 64), (1, 2, 4, 12)),
    (make_facts(q=24, kv=3, width=24 * 64), (1, 3, 6, 12, 24)),
])  # fmt: skip
def test_compatible_sizes(facts: ModelFacts, sizes: tuple[int, ...]) -> None:
    assert compatible_sizes(facts) == sizes
