"""Products by warpgroups: what their inline assembly computes, what they compile for, and when they are used."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from harness.kernel_checks import relative_error
from harness.ptx import run_ptx
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.products.warpgroup import gemm, trial
from mgpu.worker.kernels.products.warpgroup.widen import assembly
from mgpu.worker.kernels.runtime import LAUNCH_MODE
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


@pytest.mark.parametrize("byte", range(4))
def test_pairs_are_widened_to_scale_times_code_plus_offset(byte: int) -> None:
    words, scales, offsets = (0x1F3A5C7E, 0xE081D4F2), (0.0371, 1.25), (-0.81, 3.0)
    packed = [bits(scale) | bits(offset) << 16 for scale, offset in zip(scales, offsets, strict=True)]
    given = dict(zip(("$2", "$3", "$4", "$5", "$6", "$7"), (*words, *packed, *packed), strict=True))
    found = run_ptx(assembly(byte, True), given)
    for part, name in ((2 * byte, "$0"), (2 * byte + 1, "$1")):
        codes = [(word >> 4 * part & 15) - 8 for word in words]
        numbers = torch.tensor(codes) * torch.tensor(scales).bfloat16().double()
        expected = (numbers + torch.tensor(offsets).bfloat16().double()).bfloat16()
        assert halves(found[name]) == expected.tolist()


@pytest.mark.parametrize("zero", [-8, 0, 5, 120])
def test_groups_are_widened_as_from_a_scale_of_sixteen_bits(zero: int) -> None:
    words, scale = (0x1F3A5C7E, 0xE081D4F2), 0.0371093
    rest = bits(scale - float(torch.tensor(scale).bfloat16()))
    middle = bits(-136 - zero) * 0x10001
    factors = bits(scale) | rest << 16
    given = {"$2": words[0], "$3": words[1], "$4": factors, "$5": factors, "$6": middle, "$7": middle}
    for byte in range(4):
        found = run_ptx(assembly(byte, False), given)
        for part, name in ((2 * byte, "$0"), (2 * byte + 1, "$1")):
            exact = [((word >> 4 * part & 15) - 8 - zero) * scale for word in words]
            # The nearest bfloat16, or now and then its neighbour.
            assert halves(found[name]) == pytest.approx(exact, rel=2**-8 + 2**-16)


def test_they_compile_for_hopper() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "harness.compiled_sizes", "90", str(227 << 10), "warpgroups"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    tiles = [each for each in found if each["kernel"] == "_warpgroup_gemm_kernel"]
    assert len({each["case"] for each in tiles}) >= 4
    assert all(each["shared"] <= 227 << 10 for each in tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_products_equal_those_of_the_dequantized_weight(name: str) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU, which is the one that has warpgroups")
    device = torch.device("cuda")
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
    device = torch.device("cuda:7")
    monkeypatch.setattr(trial, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(trial, "trial_error", lambda device, product: torch.inf)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", True)
    assert trial.words_product(device) is not None
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", False)
    assert trial.words_product(device) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert trial.words_product(torch.device("cuda:6")) is None
