"""Products by warpgroups: what their inline assembly computes, what they compile for, and when they are used."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from harness.kernels.hopper import check_trial, hopper
from harness.kernels.kernel_checks import relative_error
from harness.kernels.ptx import run_ptx
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.products.warpgroup import gemm, trial
from mgpu.worker.kernels.products.warpgroup.widen import PAIR_FACTORS, assembly
from mgpu.worker.quantization.packing import PackedWeight, dequantize, pack_int4
from mgpu.worker.quantization.random_packed import random_packed

GPTQ = WeightFormat("4", 128, 1, 2, 1, source="GPTQ")
FORMS = {
    "pairs": WeightFormat("4", 32),
    "GPTQ": GPTQ,
    "no zeros": WeightFormat("4", 32, 1, 2, source="x"),
    "a scale per output": WeightFormat("4", 0, 1, 4, source="x"),
}
DEADLINE_S = 120


def weight_of(form: WeightFormat, outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    generator = torch.Generator(device).manual_seed(0)
    if not form.source:
        q = torch.randint(-8, 8, (outputs, inputs), generator=generator, device=device)
        numbers = (torch.randn(outputs, inputs // 32, generator=generator, device=device) for _ in range(2))
        return pack_int4(q, *numbers, 32)
    weight = random_packed(form, (outputs,), inputs, generator)
    weight.scales.mul_(torch.rand(weight.scales.shape, generator=generator, device=device).add_(0.5))
    if weight.zeros is not None:
        weight.zeros.random_(-8, 9, generator=generator)
    return weight


def bits(number: float) -> int:
    return int(torch.tensor(number).bfloat16().view(torch.uint16))


def halves(word: int) -> list[float]:
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).tolist()


def doubled(number: float) -> int:
    return bits(number) * 0x10001


@pytest.mark.parametrize("byte", range(4))
@pytest.mark.parametrize(("scale", "offset"), [(0.0371, -0.81), (1.25, 3.0), (-2e-5, 1e-4), (0.0, 0.5), (700.0, -9.0)])
def test_pairs_are_widened_to_scale_times_code_plus_offset(byte: int, scale: float, offset: float) -> None:
    words, pair = (0x1F3A5C7E, 0xE081D4F2), bits(scale) | bits(offset) << 16
    factors = run_ptx(PAIR_FACTORS.value, {"$3": pair})
    given = dict(zip(("$2", "$3"), words, strict=True))
    for first, name in (("$4", "$0"), ("$6", "$1"), ("$8", "$2")):
        given[first] = factors[name]
    found = run_ptx(assembly(byte), given)
    scale, offset = (float(torch.tensor(number).bfloat16()) for number in (scale, offset))
    for part, name in ((2 * byte, "$0"), (2 * byte + 1, "$1")):
        exact = [((word >> 4 * part & 15) - 8) * scale + offset for word in words]
        got = [number * 65536 for number in halves(found[name])]
        # What is added is rounded, and so is the sum.
        assert got == pytest.approx(exact, abs=2**-8 * (abs(offset - 8 * scale) + max(map(abs, exact))))


def test_a_middle_code_has_no_error_of_its_scale() -> None:
    """The scale of a checkpoint is rounded to bfloat16, and what is added makes up for it where most codes are."""
    scale, zero = 0.0371093, 3
    near = float(torch.tensor(scale).bfloat16())
    added = (-8 * near - zero * scale) / 65536
    given = {"$2": 0x88888888, "$3": 0x88888888, "$4": doubled(near * 2.0**117), "$6": doubled(near * 2.0**113)}
    for byte in range(4):
        found = run_ptx(assembly(byte), given | {"$8": doubled(added)})
        for name in ("$0", "$1"):
            assert [number * 65536 for number in halves(found[name])] == pytest.approx([-zero * scale] * 2, rel=0.02)


def test_they_compile_for_hopper() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "harness.kernels.compiled_sizes", "90", str(227 << 10), "warpgroups"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {each["kernel"]: each["case"] for each in found}
    assert {"_warpgroup_gemm_kernel", "_float8_words_kernel", "_integer_gemm_kernel", "_octet_gemm_kernel"} <= set(
        kernels
    )
    assert "_block_gemm_kernel" in kernels
    assert len({each["case"] for each in found}) == 14
    assert all(each["shared"] <= 227 << 10 for each in found)


@pytest.mark.parametrize("rows", [1, 8, 17, 64, 65, 128, 129, 256])
@pytest.mark.parametrize("outputs", [1024, 28672])
def test_the_rings_of_a_tile_fit_into_shared_memory(rows: int, outputs: int) -> None:
    tiling = gemm.choose_tiling(rows, outputs, 4096)
    slots = tiling.stages if tiling.quarters == 4 else 2
    words, activations = tiling.block_n * 32 * 4, tiling.block_m * 64 * 2 * tiling.quarters
    assert slots * words + tiling.stages * activations <= (227 << 10) - 1024
    assert tiling.stages >= 3  # two steps are in use while the next one is copied
    assert tiling.quarters < 4 or slots > tiling.stages - 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_products_equal_those_of_the_dequantized_weight(name: str) -> None:
    device = hopper()
    sizes, counts = ((200, 512), (1024, 4096), (320, 1280)), (1, 7, 16, 40, 64, 100, 200, 256, 300)
    for (outputs, inputs), rows in itertools.product(sizes, counts):
        weight = weight_of(FORMS[name], outputs, inputs, device)
        x, bias = torch.randn(rows, inputs, device=device).bfloat16(), torch.randn(outputs, device=device).bfloat16()
        expected = x.float() @ dequantize(weight, torch.float32).T
        assert relative_error(gemm.warpgroup_gemm(x, weight), expected) < 5e-3
        assert relative_error(gemm.warpgroup_gemm(x, weight, bias_N=bias), expected + bias) < 5e-3


@pytest.mark.parametrize(
    ("form", "dtype", "taken"),
    [
        (GPTQ, torch.bfloat16, True),
        (GPTQ, torch.float16, False),
        (WeightFormat("4", 128, 1, 2, 1, True, source="act-order"), torch.bfloat16, False),
        (WeightFormat("8", 128, 1, 2, 1, source="x"), torch.bfloat16, False),
        (WeightFormat("fp4", 32, 1, 1, source="MXFP4"), torch.bfloat16, False),
        (GGUF_FORMATS["Q4_K"], torch.bfloat16, False),
        (GGUF_FORMATS["Q4_1"], torch.bfloat16, False),
        (GGUF_FORMATS["Q4_0"], torch.bfloat16, True),
    ],
)
def test_words_of_scaled_integers_are_taken(form: WeightFormat, dtype: torch.dtype, taken: bool) -> None:
    weight = random_packed(form, (64,), 512, torch.Generator().manual_seed(0))
    assert trial.takes_words(weight, dtype) is taken


def test_a_device_that_fails_the_trial_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trial(monkeypatch, trial, "words_product", (10, 0))
