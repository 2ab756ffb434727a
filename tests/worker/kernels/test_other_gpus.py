"""Kernels are compiled for GPUs that are not here: what they have less of than an H200 must be enough."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgpu.worker.kernels.attention import decode as decode_attention
from mgpu.worker.kernels.attention import prefill as prefill_attention
from mgpu.worker.kernels.experts import choose as experts
from mgpu.worker.kernels.experts import grouped
from mgpu.worker.kernels.products import quantized_gemm
from mgpu.worker.quantization.packing import WeightKind

ADA_BYTES, AMPERE_BYTES, HOPPER_BYTES = 99 << 10, 163 << 10, 227 << 10
"""What a program may have in shared memory on an RTX 4090 or L40S, an A100, and an H200."""
DEADLINE_S = 120


@pytest.mark.parametrize(
    ("capability", "shared", "cases"), [(80, AMPERE_BYTES, "float8"), (89, ADA_BYTES, "sizes")], ids=str
)
def test_kernels_fit_smaller_and_older_gpus(capability: int, shared: int, cases: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "harness.kernels.compiled_sizes", str(capability), str(shared), cases]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({each["case"] for each in found}) >= 2
    assert [each for each in found if each["shared"] > shared] == []


def test_attention_of_prompts_of_a_whole_model_spills_no_registers(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels.compiled", "--gpus", "89", "--models", "8B dense bfloat16 auto"]
    command += ["--kernels", "prefill", "--processes", "1", "--save", tmp_path]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "sm_89.jsonl").read_text().splitlines()]
    assert {each["kernel"] for each in found} == {"_prefill_kernel"}
    assert all(each["registers"] > 0 and not each["error"] and not each["stack"] for each in found)


@pytest.mark.parametrize(("shared", "stages"), [(HOPPER_BYTES, 5), (AMPERE_BYTES, 5), (ADA_BYTES, 3)], ids=str)
def test_decode_attention_has_fewer_tiles_under_way_where_memory_is_small(shared: int, stages: int) -> None:
    assert decode_attention.choose_tiling(1, 8, 128, torch.bfloat16, shared).num_stages == stages


@pytest.mark.parametrize(("shared", "block_n"), [(HOPPER_BYTES, 32), (AMPERE_BYTES, 32), (ADA_BYTES, 16)], ids=str)
def test_decode_attention_in_float32_has_smaller_tiles_for_heads_of_512(shared: int, block_n: int) -> None:
    assert decode_attention.choose_tiling(1, 8, 512, torch.float32, shared).block_n == block_n


@pytest.mark.parametrize(("shared", "block_m"), [(HOPPER_BYTES, 128), (ADA_BYTES, 64)], ids=str)
def test_prefill_attention_has_smaller_tiles_for_wide_heads_where_memory_is_small(shared: int, block_m: int) -> None:
    assert prefill_attention.choose_tiling(256, 64, torch.bfloat16, shared).block_m == block_m


@pytest.mark.parametrize(("shared", "block_m"), [(HOPPER_BYTES, 64), (AMPERE_BYTES, 32), (ADA_BYTES, 32)], ids=str)
def test_prefill_attention_has_smaller_tiles_for_heads_of_512(shared: int, block_m: int) -> None:
    assert prefill_attention.choose_tiling(512, 64, torch.bfloat16, shared).block_m == block_m


@pytest.mark.parametrize(
    ("shared", "bulk", "stages"),
    [(HOPPER_BYTES, True, 4), (HOPPER_BYTES, False, 4), (AMPERE_BYTES, False, 4), (ADA_BYTES, False, 3)],
    ids=str,
)
def test_products_of_many_rows_of_experts_have_as_many_stages_as_fit(shared: int, bulk: bool, stages: int) -> None:
    down = experts.choose_tiles(128.0, torch.bfloat16).down
    step_bytes = 2 * (128 + down.block_n) * down.block_k
    assert grouped.fitting_stages(down, step_bytes, bulk, shared) == stages
    assert step_bytes * (stages - (not bulk)) <= shared


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("rows", [2, 32, 64, 256])
def test_products_are_cut_for_an_h200_as_they_were_measured_there(kind: WeightKind, rows: int) -> None:
    for n in (1024, 6144, 28672):
        chosen = quantized_gemm.choose_tiling(kind, rows, n, torch.bfloat16, HOPPER_BYTES)
        assert chosen == quantized_gemm._fastest_tiling(kind, rows, n)
