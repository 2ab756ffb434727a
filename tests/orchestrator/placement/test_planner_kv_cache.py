"""What ``--kv-cache-dtype`` changes in a plan: bytes per token, and which GPUs can be used."""

from dataclasses import replace

import pytest

from harness.machines import QWEN3_32B, TINY, cpus, gpus
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text

FP8 = LayoutOptions(kv_cache_dtype="fp8")


def with_capability(machine: Machine, *capabilities: tuple[int, int] | None) -> Machine:
    pairs = zip(machine.devices, capabilities, strict=True)
    return replace(machine, devices=tuple(replace(device, capability=capability) for device, capability in pairs))


def test_the_same_memory_holds_twice_the_tokens_of_bf16() -> None:
    wide, narrow = (plan(QWEN3_32B, gpus(80, 80), options) for options in (LayoutOptions(), FP8))
    assert narrow.rows[0].kv_token_bytes * 2 == wide.rows[0].kv_token_bytes == 2 * 64 * 4 * 128 * 2
    assert abs(narrow.kv_tokens - 2 * wide.kv_tokens) <= 64
    assert narrow.rows[0].weight_bytes == wide.rows[0].weight_bytes


def test_and_four_times_those_of_fp32_on_the_cpu() -> None:
    options = LayoutOptions(kv_memory=1 << 20, max_rows=4096)
    wide, narrow = plan(TINY, cpus(1), options), plan(TINY, cpus(1), replace(options, kv_cache_dtype="fp8"))
    assert narrow.kv_tokens == 4 * wide.kv_tokens
    assert narrow.kv_memory == wide.kv_memory == 1 << 20


def test_the_layout_says_so() -> None:
    narrow = plan(QWEN3_32B, gpus(80), FP8)
    assert "KV cache in fp8 (e4m3): " in layout_text(narrow)
    assert layout_json(narrow)["kv_cache_dtype"] == "fp8"
    assert "KV cache: " in layout_text(plan(QWEN3_32B, gpus(80), LayoutOptions()))


def test_gpus_that_cannot_convert_float8_are_refused_if_they_are_used() -> None:
    machine = with_capability(gpus(80, 80), (9, 0), (8, 0))
    with pytest.raises(PlacementError, match=r"capability 8\.9 or later, and GPU 1 \(Test GPU\) has 8\.0"):
        plan(QWEN3_32B, machine, FP8)
    assert plan(QWEN3_32B, machine, LayoutOptions()).layout.placement.world_size == 2
    assert plan(QWEN3_32B, machine, replace(FP8, tp=1)).layout.placement.world_size == 1
    assert plan(QWEN3_32B, with_capability(gpus(80), None), FP8).layout.kv_cache_dtype == "fp8"


def test_a_length_that_does_not_fit_in_bf16_but_in_fp8_names_the_option() -> None:
    options = LayoutOptions(max_seq_len=6000, kv_memory=1 << 30)  # 256 KiB per token: 4,096 of them
    with pytest.raises(PlacementError, match=r"--kv-cache-dtype fp8 would hold 8192 tokens\. "):
        plan(QWEN3_32B, gpus(80), options)
    with pytest.raises(PlacementError) as refused:
        plan(QWEN3_32B, gpus(80), replace(options, max_seq_len=9000))
    assert "fp8" not in str(refused.value)
    assert plan(QWEN3_32B, gpus(80), replace(options, kv_cache_dtype="fp8")).kv_tokens == 8192
