"""Plans of mixtures of experts: bytes by hand arithmetic, how ranks share experts and why, and refusals."""

from dataclasses import replace
from math import ceil

import pytest

from harness.assertions import assert_has_all
from harness.machines import GIB, QWEN3_32B, cpus, gpus
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import ModelFacts

QWEN3_235B = make_facts(
    q=64, kv=4, layers=94, hidden=4096, width=12288, vocab=151936, architecture="qwen3_moe", qk_norm=True,
    experts=ExpertFacts(128, 8, 1536, (True,) * 94, normalizes=True),
)  # fmt: skip
MIXTRAL_8X22B = make_facts(
    q=48, kv=8, layers=56, hidden=6144, width=16384, vocab=32768, context=65536, architecture="mixtral",
    experts=ExpertFacts(8, 2, 16384, (True,) * 56, normalizes=True),
)  # fmt: skip
GPT_OSS_120B = make_facts(
    q=64, kv=8, layers=36, hidden=2880, width=2880, head_dim=64, vocab=201088, context=131072, architecture="gpt_oss",
    qkv_bias=True, output_bias=True, attention_sinks=True,
    experts=ExpertFacts(128, 4, 2880, (True,) * 36, normalizes=True, router_bias=True, bias=True),
)  # fmt: skip
DEEPSEEK_SHAPED = make_facts(
    q=128, kv=128, layers=61, hidden=7168, width=18432, head_dim=128, vocab=129280, architecture="qwen2_moe",
    experts=ExpertFacts(
        256, 8, 2048, tuple(layer >= 3 for layer in range(61)), normalizes=True, shared_width=2048, shared_gate=True
    ),
)  # fmt: skip
TINY = make_facts(
    q=4, kv=2, layers=4, hidden=64, width=128, head_dim=32, vocab=100, context=256, architecture="qwen3_moe",
    qk_norm=True, experts=ExpertFacts(6, 2, 96, (True, False, True, True), normalizes=True),
)  # fmt: skip


@pytest.mark.parametrize("tp", [4, 8])
def test_qwen3_235b_in_bf16_needs_four_gpus_of_141_gib(tp: int) -> None:
    planned = plan(QWEN3_235B, gpus(*[141] * tp), LayoutOptions())
    attention = 4096 * (64 * 128 + 2 * max(1, 4 // tp) * 128 * tp) // tp + 64 * 128 * 4096 // tp
    expert = 3 * 4096 * 1536 // tp
    layer = attention + 128 * expert + 128 * 4096 + 2 * 4096 + 2 * 128
    weights = 2 * (94 * layer + 2 * 151936 * 4096 // tp + 4096)
    assert [row.weight_bytes for row in planned.rows] == [weights] * tp
    assert (planned.mode, planned.layout.expert_split) == ("tensor-parallel", "tensor")


@pytest.mark.parametrize("count", [1, 2])
def test_qwen3_235b_does_not_fit_fewer(count: int) -> None:
    with pytest.raises(PlacementError, match="4 GPUs of this size would hold it"):
        plan(QWEN3_235B, gpus(*[141] * count), LayoutOptions())


def test_qwen3_235b_names_active_and_all_bytes() -> None:
    planned = plan(QWEN3_235B, gpus(*[141] * 8), LayoutOptions())
    layer = 4096 * (64 * 128 + 2 * 4 * 128) + 64 * 128 * 4096 + 128 * 4096 + 2 * 4096 + 2 * 128
    edges = 2 * 151936 * 4096 + 4096
    total, active = (2 * (94 * (layer + count * 3 * 4096 * 1536) + edges) for count in (128, 8))
    experts = layout_json(planned)["experts"]
    assert experts == {
        "count": 128, "active": 8, "layers": 94, "split": "tensor", "total_weight_bytes": total,
        "active_weight_bytes": active, "reason": planned.expert_reason, "cpu_layers": [],
    }  # fmt: skip
    line = next(line for line in layout_text(planned).splitlines() if line.startswith("experts: "))
    assert_has_all(
        line, "128 in 94 of 94 layers, 8 active", f"{active / GIB:.1f} GiB of {total / GIB:.1f} GiB",
        "each rank has 192 of 1536 columns of every expert",
    )  # fmt: skip


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_whole_experts_if_asked(tp: int) -> None:
    planned = plan(QWEN3_235B, gpus(*[300] * tp), LayoutOptions(experts="parallel"))
    sliced = plan(QWEN3_235B, gpus(*[300] * tp), LayoutOptions(experts="tensor"))
    assert planned.layout.expert_split == "parallel"
    assert planned.rows[0].weight_bytes == sliced.rows[0].weight_bytes  # 128 / 8 and 1536 / 8 are whole numbers
    assert f"each rank has up to {128 // tp} whole experts (--experts parallel)" in layout_text(planned)


@pytest.mark.parametrize(("count", "mode"), [(2, "tensor-parallel"), (4, "tensor-parallel"), (8, "tensor-parallel")])
def test_mixtral_8x22b_takes_two_gpus_of_141_gib_and_more(count: int, mode: str) -> None:
    planned = plan(MIXTRAL_8X22B, gpus(*[160] * count), LayoutOptions())
    attention = 6144 * (48 + 2 * 8) * 128 + 48 * 128 * 6144
    matrices = (attention + 8 * 3 * 6144 * 16384) // count
    layer = matrices + 8 * 6144 + 2 * 6144
    assert planned.rows[0].weight_bytes == 2 * (56 * layer + 2 * 32768 * 6144 // count + 6144)
    assert planned.mode == mode


def test_mixtral_8x22b_on_one_gpu_says_what_would_hold_it() -> None:
    with pytest.raises(PlacementError) as refused:
        plan(MIXTRAL_8X22B, gpus(141), LayoutOptions())
    assert_has_all(str(refused.value), "261.9 GiB of weights", "--quant 4 would fit", "4 GPUs of this size")


def test_layers_of_both_kinds_are_counted_as_what_they_are() -> None:
    planned = plan(TINY, cpus(2), LayoutOptions(device_layers="0:2;1:2"))
    attention = 64 * (4 + 2 * 2) * 32 + 4 * 32 * 64
    rest, dense, sparse = 2 * 64 + 2 * 32, 3 * 64 * 128, 6 * 3 * 64 * 96 + 6 * 64
    first, last = planned.rows
    assert first.weight_bytes == 4 * (2 * (attention + rest) + dense + sparse + 100 * 64)
    assert last.weight_bytes == 4 * (2 * (attention + rest) + 2 * sparse + 100 * 64 + 64)


@pytest.mark.parametrize("size", [2, 4])
def test_experts_that_cannot_be_sliced_into_int4_groups_stay_whole(size: int) -> None:
    planned = plan(TINY, cpus(size), LayoutOptions(quant="4"))
    assert (planned.layout.expert_split, planned.rows[0].heads.num_q) == ("parallel", 4 // size)
    text = layout_text(planned)
    assert_has_all(text, f"up to {ceil(6 / size)} whole experts (slices of them would cut int4 groups)")


def test_slices_that_were_asked_for_are_refused_with_both_ways_out() -> None:
    with pytest.raises(PlacementError) as refused:
        plan(TINY, cpus(2), LayoutOptions(quant="4", experts="tensor", device_layers="0+1:4"))
    assert_has_all(
        str(refused.value), "expert width 96 / 2 ranks = 48, not a multiple of 32", "or --experts parallel",
        "or --quant 8",
    )  # fmt: skip


def test_more_ranks_than_experts_are_refused_with_the_numbers() -> None:
    few = replace(TINY, experts=ExpertFacts(3, 2, 96, (True,) * 4, normalizes=True))
    with pytest.raises(PlacementError, match="3 experts < 4 ranks"):
        plan(few, cpus(4), LayoutOptions(experts="parallel"))
    assert plan(few, cpus(4), LayoutOptions()).layout.expert_split == "tensor"


def test_a_model_without_experts_has_none_to_split() -> None:
    with pytest.raises(PlacementError, match="--experts parallel: this model has no experts"):
        plan(QWEN3_32B, gpus(80), LayoutOptions(experts="parallel"))
    assert "experts" not in layout_text(plan(QWEN3_32B, gpus(80), LayoutOptions()))
    assert layout_json(plan(QWEN3_32B, gpus(80), LayoutOptions()))["experts"] is None


def test_a_hybrid_shares_experts_inside_each_stage() -> None:
    planned = plan(TINY, cpus(3), LayoutOptions(device_layers="0:1;1+2:3", experts="parallel"))
    assert planned.mode == "hybrid"
    assert "up to 3 whole experts" in layout_text(planned)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_gpt_oss_120b_widened_to_bf16(tp: int) -> None:
    planned = plan(GPT_OSS_120B, gpus(*[141] * tp), LayoutOptions())
    attention = 2880 * (64 + 2 * 8) * 64 // tp + 64 * 64 * 2880 // tp
    biases = (64 + 2 * 8) * 64 // tp + 2880 + 64 // tp  # q, k, v; output; sinks
    experts = 128 * (3 * 2880 * 2880 // tp + 2 * 2880 // tp + 2880) + 128 * 2880 + 128
    layer = attention + biases + experts + 2 * 2880
    assert planned.rows[0].weight_bytes == 2 * (36 * layer + 2 * 201088 * 2880 // tp + 2880)
    whole = plan(GPT_OSS_120B, gpus(*[200] * tp), LayoutOptions(experts="parallel"))
    fewer_biases = 128 * (2 * 2880 // tp + 2880) - 128 // tp * 3 * 2880
    assert whole.rows[0].weight_bytes == planned.rows[0].weight_bytes - 2 * 36 * fewer_biases


def test_gpt_oss_120b_does_not_fit_one_gpu() -> None:
    with pytest.raises(PlacementError, match="2 GPUs of this size would hold it"):
        plan(GPT_OSS_120B, gpus(141), LayoutOptions())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_model_of_deepseeks_shape_is_too_large_for_four(count: int) -> None:
    with pytest.raises(PlacementError, match="16 GPUs of this size would hold it"):
        plan(DEEPSEEK_SHAPED, gpus(*[141] * count), LayoutOptions())


def test_a_model_of_deepseeks_shape_in_int4_on_eight() -> None:
    planned = plan(DEEPSEEK_SHAPED, gpus(*[141] * 8), LayoutOptions(quant="4"))

    def int4(outputs: int, inputs: int) -> int:
        return outputs * (inputs // 2 + inputs // 32 * 4)

    attention = int4(3 * 16 * 128, 7168) + int4(7168, 16 * 128)
    dense = int4(2 * 2304, 7168) + int4(7168, 2304)
    expert = int4(2 * 256, 7168) + int4(7168, 256)
    sparse = 257 * expert + 2 * (256 * 7168 + 7168)  # 256 and the shared one; router and the shared one's gate in bf16
    layers = 61 * (attention + 2 * 2 * 7168) + 3 * dense + 58 * sparse
    assert planned.rows[0].weight_bytes == layers + 2 * (2 * 129280 * 7168 // 8 + 7168)
    assert "experts: 256 in 58 of 61 layers, 8 active" in layout_text(planned)


@pytest.mark.parametrize(
    ("facts", "size_gib", "tokens"),
    [(GPT_OSS_120B, 288, 16384), (TINY, 80, 16384), (TINY, 64, 8192), (TINY, 24, 2048), (QWEN3_32B, 141, 8192)],
)
def test_steps_of_experts_are_longer_where_memory_is_large(facts: ModelFacts, size_gib: int, tokens: int) -> None:
    assert plan(facts, gpus(size_gib), LayoutOptions()).limits.max_batch_tokens == tokens
    asked = LayoutOptions(max_batch_tokens=4096)
    assert plan(facts, gpus(size_gib), asked).limits.max_batch_tokens == 4096
