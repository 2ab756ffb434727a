"""What memory allows: bytes counted once."""

import os
from pathlib import Path

import pytest

from mgpu.launch.bench.limit import Limit, limit_of, machine_read_speed, parse_bandwidth, read_speed, weight_bytes
from mgpu.launch.bench.shapes import LLAMA_8B, QWEN3_30B_A3B, SMOLLM2_135M, Config, write_config
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.machine.described import described_machine
from mgpu.orchestrator.placement.machine.devices import find_machine
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.facts import ModelFacts


def facts_of(config: Config, folder: Path) -> ModelFacts:
    return read_checkpoint(write_config(folder, config), "dummy").facts


def test_the_8b_in_bf16_can_decode_286_tokens_a_second_at_4_3_tb_per_s(tmp_path: Path) -> None:
    facts, machine = facts_of(LLAMA_8B, tmp_path), described_machine("141GiB")
    choices = (LayoutOptions(), LayoutOptions(kv_cache_dtype="fp8"))
    limit, narrow = (limit_of(plan(facts, machine, options), 4.3e12) for options in choices)
    assert (limit.kv_token_bytes, narrow.kv_token_bytes) == (128 << 10, 64 << 10)
    assert round(limit.tokens_per_s(1, 128) or 0) == 286
    assert round((limit.tokens_per_s(256, 1024) or 0) / 100) == 223


def test_of_experts_only_those_that_some_row_chooses_are_read(tmp_path: Path) -> None:
    """One row reads 8 experts of 128: per layer 3 x 768 x 2,048 x 2 bytes each, beside attention and router."""
    planned = plan(facts_of(QWEN3_30B_A3B, tmp_path), described_machine("141GiB"), LayoutOptions())
    limit = limit_of(planned, 4.3e12)
    expert, layer = 3 * 768 * 2048 * 2, 2 * (2048 * (5120 + 4096 + 128) + 2 * 2048 + 2 * 128)
    head = 2 * (151936 + 1) * 2048
    assert limit.step_bytes(1, 0) == 48 * (8 * expert + layer) + head
    unchosen = 128 * (1 - 8 / 128) ** 64
    assert limit.step_bytes(64, 0) == pytest.approx(48 * ((128 - unchosen) * expert + layer) + head)
    assert round(limit.tokens_per_s(1, 128) or 0) == 705


def test_a_tied_head_is_read_although_the_embedding_is_not(tmp_path: Path) -> None:
    tied = facts_of(SMOLLM2_135M, tmp_path / "tied")
    untied = facts_of({**SMOLLM2_135M, "tie_word_embeddings": False}, tmp_path / "untied")
    assert weight_bytes(tied, 1) == weight_bytes(untied, 1) == 134_515_008


def test_quantized_weights_count_in_their_type_and_the_head_in_that_of_the_model(tmp_path: Path) -> None:
    facts = facts_of(LLAMA_8B, tmp_path)
    eight, four = (
        limit_of(plan(facts, described_machine("141GiB"), LayoutOptions(quant=q)), 4.3e12) for q in ("fp8", "4")
    )
    assert round(eight.tokens_per_s(1, 128) or 0) == 534
    assert eight.kv_token_bytes == 128 << 10
    assert round(four.tokens_per_s(1, 128) or 0) == 792  # scale and offset of every group of 32 included


def test_gpus_of_a_stage_read_side_by_side_and_cpu_workers_share_the_memory(tmp_path: Path) -> None:
    facts = facts_of(LLAMA_8B, tmp_path)
    assert limit_of(plan(facts, described_machine("4"), LayoutOptions()), 1e12).bytes_per_s == 4e12
    small = facts_of(SMOLLM2_135M, tmp_path)
    on_cpu = plan(small, find_machine("cpu", 3), LayoutOptions(max_seq_len=512, kv_memory=64 << 20))
    assert limit_of(on_cpu, 1e10).bytes_per_s == 1e10


def test_without_a_bandwidth_there_is_no_limit() -> None:
    assert Limit(1, 1, 0.0).tokens_per_s(1, 1) is None


@pytest.mark.parametrize(("text", "expected"), [("4.30TB/s", 4.3e12), ("25 gb/s", 25e9), ("800MB", 8e8)])
def test_speeds_are_read_as_people_write_them(text: str, expected: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["fast", "4.3", "0GB/s", "-1GB/s"])
def test_what_is_no_speed_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"4\.30TB/s"):
        parse_bandwidth(text)


def test_memory_is_read_at_some_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_speed(0.0, 1 << 20) > 1e6
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert machine_read_speed() > 1e6
