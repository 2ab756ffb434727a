"""What ``--quant`` changes in a plan: bytes, and which sizes can be split."""

from dataclasses import replace

import pytest

from harness.machines import QWEN3_32B, SMOLLM2, TINY, cpus, gpus
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.orchestrator.placement.split.divisibility import compatible_sizes
from mgpu.orchestrator.placement.split.sizes import largest_matrix_bytes
from mgpu.protocol.model.quantization import Quant

EMBEDDING, NORMS = 2 * 151936 * 5120, 2 * (64 * 2 * 5120 + 5120)
OUTPUTS = 64 * (8192 + 2 * 1024 + 5120 + 2 * 25600 + 5120)
ELEMENTS = 64 * (5120 * (8192 + 2 * 1024) + 8192 * 5120 + 3 * 5120 * 25600)


@pytest.mark.parametrize("quant", ["8", "fp8"])
def test_eight_bits_take_a_byte_per_weight_and_a_scale_per_output(quant: Quant) -> None:
    row = plan(QWEN3_32B, gpus(80), LayoutOptions(quant=quant)).rows[0]
    assert row.weight_bytes == ELEMENTS + 4 * OUTPUTS + 2 * EMBEDDING + NORMS


def test_four_bits_take_half_a_byte_and_a_scale_per_group() -> None:
    row = plan(QWEN3_32B, gpus(80), LayoutOptions(quant="4")).rows[0]
    assert row.weight_bytes == ELEMENTS // 2 + 4 * ELEMENTS // 32 + 2 * EMBEDDING + NORMS


def test_a_model_that_does_not_fit_does_so_quantized() -> None:
    with pytest.raises(PlacementError, match="--quant 8 would fit"):
        plan(QWEN3_32B, gpus(48), LayoutOptions())
    with pytest.raises(PlacementError, match="--quant 4 would fit"):
        plan(QWEN3_32B, gpus(32), LayoutOptions(quant="8"))
    assert plan(QWEN3_32B, gpus(48), LayoutOptions(quant="8")).kv_tokens > 512
    assert plan(QWEN3_32B, gpus(32), LayoutOptions(quant="4")).kv_tokens > 512


def test_the_saved_memory_holds_more_context() -> None:
    tokens = [plan(QWEN3_32B, gpus(80), LayoutOptions(quant=quant)).kv_tokens for quant in ("none", "8", "4")]
    assert tokens == sorted(tokens)
    assert tokens[0] < tokens[2] / 5


def test_a_size_that_cuts_int4_groups_is_refused_with_the_numbers_and_ways_out() -> None:
    with pytest.raises(PlacementError) as refused:
        plan(SMOLLM2, gpus(*[80] * 9), LayoutOptions(quant="4"))
    text = str(refused.value)
    assert "MLP width 1536 / 9 ranks = 170.667, not a multiple of 32 (int4 groups)" in text
    assert "Compatible sizes: 1, 3." in text
    assert "CUDA_VISIBLE_DEVICES=0,1,2 (or --tp 3)" in text
    assert text.endswith("or --quant 8, which has no groups")
    assert plan(SMOLLM2, gpus(*[80] * 9), LayoutOptions(quant="8")).layout.placement.world_size == 9


def test_a_stage_of_a_map_is_checked_like_a_size() -> None:
    narrow = replace(TINY, intermediate_size=94)
    with pytest.raises(PlacementError, match=r"94 / 2 ranks = 47, .* compatible sizes: 1; or --quant 8"):
        plan(narrow, cpus(2), LayoutOptions(device_layers="0+1:8", quant="4"))
    assert plan(narrow, cpus(2), LayoutOptions(device_layers="0:4;1:4", quant="4")).mode == "layer-mapped"


def test_other_problems_do_not_speak_of_groups() -> None:
    with pytest.raises(PlacementError) as refused:
        plan(QWEN3_32B, gpus(*[80] * 3), LayoutOptions(quant="4"))
    assert "--quant 8" not in str(refused.value)


def test_sizes_without_int4_stay_as_they_were() -> None:
    for quant in ("8", "fp8"):
        assert compatible_sizes(SMOLLM2, quant) == compatible_sizes(SMOLLM2)


def test_table_and_json_name_the_format() -> None:
    assert "in bfloat16, linear layers in int8 (" in layout_text(plan(QWEN3_32B, gpus(80), LayoutOptions(quant="8")))
    quantized = plan(TINY, cpus(2), LayoutOptions(quant="4"))
    assert "in float32, linear layers in int4, groups of 32 (" in layout_text(quantized)
    assert layout_json(quantized)["quant"] == "4"
    assert "linear layers" not in layout_text(plan(QWEN3_32B, gpus(80), LayoutOptions()))


def test_a_model_whose_groups_allow_no_split_is_layer_mapped_with_the_reason() -> None:
    chosen = plan(replace(TINY, intermediate_size=94), cpus(2), LayoutOptions(quant="4"))
    assert chosen.mode == "layer-mapped"
    assert chosen.reason == "the model has no tensor-parallel size above 1 (int4 groups would be cut)"


@pytest.mark.parametrize(("tp_size", "dtype_bytes"), [(1, 2), (1, 4), (2, 2), (8, 2)])
def test_the_largest_matrix_is_counted_while_it_is_dense(tp_size: int, dtype_bytes: int) -> None:
    gate_and_up = 2 * 25600 // tp_size * 5120
    assert largest_matrix_bytes(QWEN3_32B, tp_size, dtype_bytes) == gate_and_up * dtype_bytes


def test_memory_to_quantize_the_largest_matrix_is_kept_free() -> None:
    dense, quantized = (plan(QWEN3_32B, gpus(80), LayoutOptions(quant=quant)).rows[0] for quant in ("none", "8"))
    reserve = 2 * 25600 * 5120 * 2
    freed = dense.weight_bytes - quantized.weight_bytes
    assert dense.kv_bytes + freed - quantized.kv_bytes >= 0.9 * reserve
