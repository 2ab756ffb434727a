"""Every refusal of a layout has the numbers and a way out that works."""

import re
from typing import Any

import pytest

from harness.assertions import assert_has_all
from harness.machines import QWEN3_32B, SMOLLM2, TINY, cpus, gpus
from harness.planning import LLAMA_8B, planned, refusal
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.protocol.model.facts import ModelFacts

NARROW = make_facts(q=8, kv=8, layers=2, hidden=64, width=4, head_dim=8, vocab=100, context=64)
REFUSALS: dict[str, tuple[ModelFacts, Machine, dict[str, Any], list[str]]] = {
    "the visible count is never lowered silently":
        (SMOLLM2, gpus(8, 8), {}, ["2 GPUs cannot split", "9 query heads % 2 = 1", "3 KV heads % 2 = 1",
                                   "Compatible sizes: 1, 3, 9.", "CUDA_VISIBLE_DEVICES=0 "]),
    "GPUs are named the way that the driver does":
        (QWEN3_32B, gpus(80, 80, 80, selectors=["4", "6", "7"]), {}, ["CUDA_VISIBLE_DEVICES=4,6 "]),
    "an MLP narrower than the ranks": (NARROW, cpus(8), {}, ["MLP width 4 < 8 ranks"]),
    "--tp of a size that does not fit lists the sizes":
        (QWEN3_32B, gpus(80, 80, 80), {"tp": 3}, ["Compatible sizes: 1, 2, 4, 8, 16, 32, 64.", "--tp 2"]),
    "a stage that cannot be split lists the sizes":
        (QWEN3_32B, gpus(*[80] * 4), {"device_layers": "0+1+2:32;3:32"}, ["64 query heads % 3 = 1", "1, 2, 4, 8"]),
    "more GPUs than layers":
        (TINY, gpus(*[8] * 9, nccl=False, selectors=list("012345678")), {},
         ["9 GPUs", "8 layers", "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7"]),
    "a model that does not fit says what would":
        (QWEN3_32B, gpus(24), {},
         ["24.0 GiB free of 24.0 GiB", "61.0 GiB of weights", "4 GPUs of this size would hold it"]),
    "a busy GPU is named":
        (QWEN3_32B, gpus(80, 10, total_gib=80), {}, ["GPU 1 (Test GPU, 10.0 GiB free of 80.0 GiB)"]),
    "no number of tiny GPUs holds a large model": (QWEN3_32B, gpus(1), {}, ["larger GPUs"]),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "machine", "options", "words"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_has_the_numbers_and_the_way_out(
    facts: ModelFacts, machine: Machine, options: dict[str, Any], words: list[str]
) -> None:
    assert_has_all(refusal(facts, machine, **options), *words)


@pytest.mark.parametrize("text", ["0\x1e:32;1:32", "0:32;1:32\u3000", "0+\x851:64", "\u0661:64"])
def test_only_plain_spaces_may_stand_in_a_layer_map(text: str) -> None:
    """A regular expression knows more spaces and digits than `int` takes."""
    with pytest.raises(PlacementError, match="is not an ordinal:count pair"):
        planned(QWEN3_32B, gpus(80, 80), device_layers=text)


def test_the_error_offers_a_layer_map_that_works() -> None:
    machine = gpus(80, 80, 80)
    match = re.search(r'-n "([^"]+)"', refusal(QWEN3_32B, machine))
    assert match is not None
    assert planned(QWEN3_32B, machine, device_layers=match[1]).mode == "layer-mapped"


@pytest.mark.parametrize(("count", "best"), [(2, 1), (4, 3), (8, 3)])
def test_cpu_workers_are_told_how_many_would_work(count: int, best: int) -> None:
    message = refusal(SMOLLM2, cpus(count))
    assert_has_all(message, f"{count} CPU workers", f"--workers {best} ")
    assert "CUDA" not in message


def test_an_mlp_width_that_does_not_divide_is_split_unevenly() -> None:
    rows = planned(SMOLLM2, cpus(9)).rows
    assert len(rows) == 9
    assert {row.heads.num_q for row in rows} == {1}


def test_a_vocabulary_that_does_not_divide_is_padded() -> None:
    facts = make_facts(q=4, kv=2, layers=2, hidden=64, width=128, head_dim=16, vocab=103, context=64)
    rows = planned(facts, cpus(4)).rows
    assert len({row.weight_bytes for row in rows}) == 1


def test_a_long_context_is_named_where_it_is_the_reason() -> None:
    """Without 131072 tokens two GPUs, or int8 weights, would do."""
    long = refusal(LLAMA_8B, gpus(16), max_seq_len=131072)
    assert_has_all(long, "does not fit", "For --max-seq-len 131072: ", "With a shorter one, or without it: ")
    first, second = long.split("With a shorter one, or without it: ")
    assert "--quant" not in first.split("For --max-seq-len 131072: ")[1]
    assert_has_all(second, "--quant 8 would fit", "2 GPUs of this size")
    assert "--max-seq-len" not in refusal(LLAMA_8B, gpus(16))
    assert "--max-seq-len" not in refusal(LLAMA_8B, gpus(16), max_seq_len=512)
