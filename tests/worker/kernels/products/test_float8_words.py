"""4-bit words times float8 rows: rows are brought into the order of codes, and what is multiplied is exact."""

import itertools

import pytest
import torch

from harness.kernels.hopper import hopper
from harness.kernels.kernel_checks import relative_error
from harness.kernels.ptx import run_ptx
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.layers.float8_codes import quantize_spans
from mgpu.worker.kernels.products import choose
from mgpu.worker.kernels.products.warpgroup import codes, float8_gemm, float8_trial
from mgpu.worker.kernels.runtime import HOPPER_SMS, LAUNCH_MODE, default_workspace, workspace_for
from mgpu.worker.quantization.float8_rows import round_rows
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.random_packed import random_packed

CPU = torch.device("cpu")
FORMS = {
    "GPTQ": WeightFormat("4", 128, 1, 2, 1, source="GPTQ"),
    "groups of 64": WeightFormat("4", 64, 1, 2, 1, source="x"),
    "a scale per output": WeightFormat("4", 0, 1, 4, source="x"),
}


def make(name: str, outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    generator = torch.Generator(device).manual_seed(0)
    weight = random_packed(FORMS[name], (outputs,), inputs, generator)
    weight.scales.mul_(torch.rand(weight.scales.shape, generator=generator, device=device).add_(0.5))
    if weight.zeros is not None:
        weight.zeros.random_(-8, 9, generator=generator)
    return weight


def operand(weight: PackedWeight) -> torch.Tensor:
    """Return the codes of a weight as the tensor core reads them, [N, padded K]."""
    octets_NRB = weight.words.view(torch.uint8).view(len(weight.words), -1, 16)
    return torch.cat((octets_NRB & 15, octets_NRB >> 4), 2).flatten(1).float()


@pytest.mark.parametrize("name", FORMS)
def test_codes_times_rows_scales_and_offsets_are_the_product(name: str, device: torch.device) -> None:
    """What the kernel for Hopper computes, in plain torch, with rows that a kernel has quantized."""
    weight = make(name, 24, 640, device)
    x = torch.randn(5, 640, device=device).bfloat16()
    span = float8_trial.span_of(weight)
    rows = quantize_spans(x, weight.words.shape[1] * 8, span)
    values_TK = rows.values.float()
    group_S = torch.arange(values_TK.shape[1] // span, device=device) * span // (weight.group or weight.k)
    group_S.clamp_(max=weight.scales.shape[1] - 1)
    scales_NS = weight.scales.float()[:, group_S]
    zeros_NS = 0 if weight.zeros is None else weight.zeros.float()[:, group_S]
    offsets_NS = -(8 + zeros_NS) * scales_NS
    products_NTS = (operand(weight)[:, None] * values_TK).view(24, 5, -1, span).sum(3)
    sums_TS = rows.sums_TS[:, : len(group_S)].float()
    found_TN = ((products_NTS * scales_NS[:, None]).sum(2) + offsets_NS @ sums_TS.T).T * rows.scale_T[:, None]
    expected_TN = round_rows(x) @ dequantize(weight, torch.float32).T
    assert relative_error(found_TN, expected_TN) < 5e-3  # sums are rounded to bfloat16


def test_the_first_sums_are_defined_where_rows_are_short(device: torch.device) -> None:
    rows = quantize_spans(torch.ones(3, 200, device=device).bfloat16(), 256, 128)
    assert rows.sums_TS[:, :8].float().tolist() == [[128 * 448.0, 72 * 448.0, *[0.0] * 6]] * 3


def test_codes_are_float8_as_they_lie_in_a_word() -> None:
    word = 0xFEDCBA98
    found = run_ptx(codes.LOW_CODES.value, {"$2": word})
    for name, first in (("$0", 0), ("$1", 1)):
        octets = torch.tensor(list(found[name].to_bytes(4, "little")), dtype=torch.uint8)
        expected = [word >> 4 * part & 15 for part in range(first, 8, 2)]
        assert (octets.view(torch.float8_e4m3fn).float() * codes.CODE_FACTOR.value).tolist() == expected
    every = torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * 512
    assert every.tolist() == list(range(16))


@pytest.mark.parametrize("rows", [65, 128, 129, 512])
@pytest.mark.parametrize(("outputs", "inputs"), [(1024, 4096), (28672, 4096), (8192, 28672)])
def test_programs_have_about_as_many_steps_each(rows: int, outputs: int, inputs: int) -> None:
    programs = float8_gemm.choose_programs(rows, outputs, inputs)
    tiles, steps = -(-outputs // float8_gemm.BLOCK_N) * -(-rows // float8_gemm.BLOCK_M), inputs // codes.STEP
    assert 1 <= programs <= HOPPER_SMS
    assert tiles * steps / programs <= 1.3 * tiles * steps / HOPPER_SMS + 4
    partials = programs * 2 * float8_gemm.BLOCK_M * float8_gemm.BLOCK_N  # of the first and the last tile
    assert partials <= 1 << 23
    rings = float8_gemm.STAGES * (float8_gemm.BLOCK_N * 64 + float8_gemm.BLOCK_M * 128)
    assert rings <= (227 << 10) - 8192  # where results change their layout


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_products_equal_those_of_rounded_rows(name: str) -> None:
    device = hopper()
    for (outputs, inputs), rows in itertools.product(
        ((200, 512), (1024, 4096), (320, 1280)), (1, 7, 64, 128, 200, 512)
    ):
        weight = make(name, outputs, inputs, device)
        x, bias = torch.randn(rows, inputs, device=device).bfloat16(), torch.randn(outputs, device=device).bfloat16()
        expected = round_rows(x) @ dequantize(weight, torch.float32).T
        quantized = quantize_spans(x, weight.words.shape[1] * 8, float8_trial.span_of(weight))
        assert relative_error(float8_gemm.float8_words_gemm(quantized, weight), expected) < 1e-2
        found = float8_gemm.float8_words_gemm(quantized, weight, bias_N=bias)
        assert relative_error(found, expected + bias) < 1e-2


def test_the_number_of_rows_decides_which_product_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "words_product", lambda device: "words")
    monkeypatch.setattr(float8_trial, "float8_words_product", lambda device: "float8")
    cpu = torch.device("cpu")
    for name in FORMS:
        found = [choose._words_product(rows, make(name, 8, 256, cpu)) for rows in (2, 64, 65, 512, 513)]
        assert found == ["words", "words", "float8", "float8", None]
    small = random_packed(WeightFormat("4", 32, 1, 2, 1, source="x"), (8,), 256, torch.Generator())
    assert choose._words_product(65, small) == "words"


def test_a_device_that_fails_the_trial_stays_weight_only(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:6")
    monkeypatch.setattr(float8_trial, "words_product", lambda device: "words")
    monkeypatch.setattr(float8_trial, "trial_error", lambda device: float("inf"))
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", False)
    assert float8_trial.float8_words_product(device) is None
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", True)
    assert float8_trial.float8_words_product(device) is not None
    monkeypatch.setenv("MGPU_FLOAT8_ROUNDING", "0")
    assert float8_trial.float8_words_product(device) is None
    monkeypatch.delenv("MGPU_FLOAT8_ROUNDING")
    monkeypatch.setattr(float8_trial, "words_product", lambda device: None)
    assert float8_trial.float8_words_product(device) is None


def test_a_product_that_needs_more_has_scratch_of_its_own() -> None:
    shared = default_workspace(CPU)
    needed = shared.partials.numel() + 1
    own = workspace_for(CPU, needed, 160)
    assert own.partials.numel() == needed
    assert own.counters.tolist() == [0] * 160
    assert workspace_for(CPU, 1000, 10) is shared
