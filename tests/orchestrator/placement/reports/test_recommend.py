"""Recommended layouts and formats: what fits, in which order, and what to type."""

import pytest

from harness.machines import QWEN3_32B, cpus, gpus
from harness.specs import make_facts
from mgpu.orchestrator.placement.machine.described import described_machine
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.reports.recommend import (
    Recommendation,
    recommend,
    recommendation_json,
    recommendation_lines,
    stored_bits,
)
from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.model.facts import ModelFacts

LLAMA_8B = make_facts(q=32, kv=8, layers=32, hidden=4096, width=14336, vocab=128256, context=131072)
LLAMA_70B = make_facts(q=64, kv=8, layers=80, hidden=8192, width=28672, vocab=128256, context=131072)
NINE_HEADS = make_facts(q=9, kv=9, layers=32, hidden=4608, width=16384, vocab=32000, context=32768)


def on(facts: ModelFacts, text: str, bits: float = 16, **options: object) -> list[Recommendation]:
    return recommend(facts, described_machine(text, {}), LayoutOptions(**options), bits)  # type: ignore[arg-type]


def shown(found: list[Recommendation]) -> list[str]:
    return [each.options for each in found[:8]]


@pytest.mark.parametrize(("facts", "text", "best"), [
    (LLAMA_8B, "1xH200", "--quant fp8"), (LLAMA_8B, "2xH200", "--quant fp8"),
    (LLAMA_8B, "1xA100", "--quant 8"),  # it has no float8
    (LLAMA_8B, "2x4090", "--quant fp8"),  # sums through the host's memory cost less than half of the weights
    (QWEN3_32B, "1x5090", "--quant 4"), (LLAMA_70B, "2xH200", "--quant fp8"), (QWEN3_32B, "2xA100", "--quant 8"),
    (LLAMA_8B, "1x12GiB", "--quant 8 --kv-cache-dtype fp8"),  # int8 without it has no room for 8,192 tokens
])  # fmt: skip
def test_the_best_one(facts: ModelFacts, text: str, best: str) -> None:
    assert shown(on(facts, text))[0] == best


def test_only_what_fits_is_there_and_each_layout_once() -> None:
    found = on(LLAMA_70B, "2x60GiB")
    assert "" not in [each.options for each in found]  # 139 GB of weights
    assert shown(found)[:2] == ["--quant 8", "--quant fp8"]
    assert len({(each.plan.layout, each.plan.limits) for each in found}) == len(found)
    assert on(LLAMA_70B, "1x24GiB") == []


def test_room_for_the_context_goes_before_bits_and_bits_before_speed() -> None:
    found = on(LLAMA_8B, "1x12GiB", max_seq_len=20_000)
    assert shown(found)[0] == "--quant 4"
    ranks = [(each.has_context, each.bits > 5.5) for each in on(LLAMA_8B, "1xL4")]
    assert ranks == sorted(ranks, reverse=True)


def test_a_map_of_layers_is_offered_where_the_model_does_not_split() -> None:
    offered = [each.options for each in on(NINE_HEADS, "2xA10")]
    assert any(options.startswith('-n "0:16;1:16"') or options == "--quant 8" for options in offered)
    assert not any("-n" in each.options for each in on(LLAMA_8B, "2xH200"))
    assert any("-n" in each.options for each in on(LLAMA_8B, "2x4090"))


def test_bits_are_those_of_the_file_if_it_has_fewer() -> None:
    assert {each.bits for each in on(LLAMA_8B, "1xH200", bits=4.8)} == {4.8}
    assert {each.bits for each in on(LLAMA_8B, "1xH200", bits=16)} == {16, 8, 5}
    half = {"a": TensorEntry("a", "BF16", (10, 10), "f", 0, 200), "norm": TensorEntry("norm", "F32", (10,), "f", 0, 40)}
    assert stored_bits(half) == 16
    assert stored_bits({"a": TensorEntry("a", "Q4_K", (2, 256), "f", 0, 288)}) == 4.5
    assert stored_bits({}) == 16


def test_the_cpu_has_nothing_to_choose() -> None:
    assert recommend(LLAMA_8B, cpus(2, 64), LayoutOptions(), 16) == []
    assert recommendation_lines("mgpu-launch serve x", []) == []


@pytest.mark.parametrize("text", ["2xH200", "8xRTX 4090", "1x12GiB", "16x24GiB", "3xA10", "5xL4"])
@pytest.mark.parametrize("facts", [LLAMA_8B, LLAMA_70B, NINE_HEADS], ids=["8B", "70B", "nine heads"])
def test_the_table_fits_80_columns(facts: ModelFacts, text: str) -> None:
    lines = recommendation_lines("mgpu-launch serve org/model", on(facts, text))
    table = [line for line in lines if not line.startswith(("type:", "  -n"))]
    assert max(map(len, table), default=0) <= 80


def test_the_table_has_context_speed_and_bits_and_ends_with_the_command() -> None:
    lines = recommendation_lines("mgpu-launch serve org/model --max-rows 64", on(LLAMA_8B, "1xH200"))
    assert lines[1].split() == ["add", "bits", "context", "of", "1", "of", "64", "2k", "prompt"]
    assert lines[2].split()[:4] == ["--quant", "fp8", "8", "131,072"]
    assert lines[-1] == "type: mgpu-launch serve org/model --max-rows 64 --quant fp8"
    assert "8,192 tokens" in lines[-2]
    assert "(4 more fit)" in recommendation_lines("x", on(LLAMA_8B, "4xH200"))[-2]
    long = recommendation_lines("mgpu-launch serve /a/very/long/path" + "/x" * 20, on(LLAMA_8B, "1xH200"))
    assert long[-2].endswith(" \\")
    assert long[-1] == "  --quant fp8"


def test_without_known_speeds_the_table_has_none() -> None:
    lines = recommendation_lines("mgpu-launch serve x", recommend(LLAMA_8B, gpus(80, 80), LayoutOptions(), 16))
    assert lines[1].split() == ["add", "bits", "context"]
    assert "many bits" in lines[-2]
    assert "estimated" not in "".join(lines)
    assert lines[0].endswith("(bits per weight):")


def test_as_data() -> None:
    first = recommendation_json(on(LLAMA_8B, "1xH200"))[0]
    assert (first["options"], first["bits"], first["max_seq_len"]) == ("--quant fp8", 8, 131072)
    assert isinstance(first["speed"], dict)
    assert first["speed"]["tokens_per_s_of_64_streams"] > first["speed"]["tokens_per_s_of_1_stream"]
