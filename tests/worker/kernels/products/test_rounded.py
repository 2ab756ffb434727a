"""Words of few bits in float8 products: what the inline assembly computes, in which order, and when it is used."""

import itertools
from dataclasses import replace

import pytest
import torch

from harness.kernels.hopper import hopper
from harness.kernels.kernel_checks import relative_error
from harness.kernels.ptx import run_ptx
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.quantization import weight_format
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.layers.float8_quantize import quantize_rows
from mgpu.worker.kernels.products import choose, rounded_product, rounded_trial
from mgpu.worker.kernels.products.dequantize_groups import dequantize_float8
from mgpu.worker.kernels.products.warpgroup import blocks_trial
from mgpu.worker.kernels.products.warpgroup.rounded import ROUNDED_BITS, assembly_of, middle_of
from mgpu.worker.kernels.products.warpgroup.rounded_gemm import RoundedTiling, choose_tiling, rounded_gemm
from mgpu.worker.kernels.runtime import HOPPER_SMS, LAUNCH_MODE, default_workspace
from mgpu.worker.layers import linear
from mgpu.worker.quantization.float8_rows import Float8Rows, UnscaledProduct, round_rows
from mgpu.worker.quantization.float8_rows import quantize_rows as quantize_plainly
from mgpu.worker.quantization.float8_weights import power_of, round_dense
from mgpu.worker.quantization.packing import E2M1, HIGH_BITS, NL4, PackedWeight, WeightKind, dequantize, pack_int4
from mgpu.worker.quantization.random_packed import random_packed

CPU = torch.device("cpu")
INT4 = weight_format("4")
FORMS = (
    ("int2", True, True), ("int3", True, False), ("int4", False, True), ("int4", False, False), ("int5", False, True),
    ("int5", False, False), ("int6", True, False), ("nl4", False, False), ("fp4", False, False),
)  # fmt: skip
"""Kinds, whether a word has two scales, and whether something is added to each."""
NAMES = ("IQ4_NL", "IQ4_XS", "MXFP4", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K")


def make(name: str, outputs: int = 64, inputs: int = 512, device: torch.device = CPU) -> PackedWeight:
    generator = torch.Generator(device).manual_seed(0)
    if name != "int4":
        return random_packed(GGUF_FORMATS[name], (outputs,), inputs, generator)
    q = torch.randint(-8, 8, (outputs, inputs), generator=generator, device=device)
    numbers = (torch.randn(outputs, -(-inputs // 32), generator=generator, device=device) for _ in range(2))
    return pack_int4(q, *numbers, 32)


def pair(low: torch.Tensor, high: torch.Tensor) -> int:
    return int(low.view(torch.uint16)) | int(high.view(torch.uint16)) << 16


@pytest.mark.parametrize(("kind", "two_scales", "has_offset"), FORMS)
def test_codes_become_float8_with_their_scales(kind: WeightKind, two_scales: bool, has_offset: bool) -> None:
    bits, middle = ROUNDED_BITS[kind], middle_of(kind, has_offset)
    lowest, width = 2 if bits < 4 else 4, HIGH_BITS.get(kind, 0)
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(1 << 8 * lowest, (4,), generator=generator).tolist()
    high = torch.randint(1 << 8 * width, (4,), generator=generator).tolist()
    scales = (torch.rand(4, 2, generator=generator) * 4 - 1).half()
    added = torch.randn(4, 2, generator=generator).half() if has_offset else (-middle * scales.float()).half()
    factors = [pair(*row) for row in scales] + [pair(*row) for row in added] * has_offset
    if not two_scales:
        scales[:, 1], added[:, 1] = scales[:, 0], added[:, 0]
        factors = [pair(scale[0], each[0]) for scale, each in zip(scales, added, strict=True)]
    given = [*words, *high * (width > 0), *factors]
    text = assembly_of(bits, width > 0, two_scales, has_offset, middle)
    found = run_ptx(text, {f"${8 + index}": number for index, number in enumerate(given)})
    for part, word in itertools.product(range(8), range(4)):
        code = words[word] >> lowest * part & (1 << lowest) - 1
        code |= (high[word] >> width * part & (1 << width) - 1) << lowest
        number = 64 + code if bits < 8 else 1152 + (NL4[code] if kind == "nl4" else int(2 * E2M1[code]))
        exact = scales[word, part // 4].double() * number + added[word, part // 4].double()
        octet = torch.tensor(found[f"${part}"] >> 8 * word & 255, dtype=torch.uint8)
        assert octet.view(torch.float8_e4m3fn) == exact.half().float().clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["int4", *NAMES])
def test_rounding_moves_weights_by_a_fortieth(name: str) -> None:
    weight = make(name)
    full, power = dequantize(weight, torch.float32), float(power_of(weight))
    assert 224 < float(full.abs().max()) * power <= 448
    assert torch.tensor(power).frexp().mantissa == 0.5
    error = relative_error(round_dense(full), full)
    assert error == 0 if name == "MXFP4" else 0.015 < error < 0.031


def test_weights_in_float8_are_in_the_order_of_rows(device: torch.device) -> None:
    """Integers from -8 to 7 times a power of two are numbers of float8: nothing is rounded."""
    q = torch.randint(-8, 8, (40, 640), device=device)
    ones = torch.ones(40, 20, device=device)
    weight = pack_int4(q, ones, 0 * ones, 32)
    weight = replace(weight, power=power_of(weight))
    rows = quantize_rows(torch.randn(5, 640, device=device).bfloat16())
    octets_NK = dequantize_float8(weight)
    assert octets_NK.shape == (40, 640)
    values_TBPW = rows.values.float().view(5, 5, 32, 4).transpose(2, 3).reshape(5, 640)
    expected_TN = values_TBPW @ q.T.float()
    assert torch.allclose(rows.values.float() @ octets_NK.float().T / weight.power, expected_TN, rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_types_of_up_to_six_bits_are_taken(name: str) -> None:
    assert rounded_trial.takes(make(name), torch.bfloat16) == (name in NAMES)
    assert not rounded_trial.takes(make(name), torch.float16)
    assert not rounded_trial.takes(make(name, outputs=40), torch.bfloat16)


def test_groups_of_64_and_more_are_left_to_products_that_round_no_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    for group, is_taken in ((32, True), (64, False), (128, False), (0, False)):
        weight = random_packed(WeightFormat("4", group, 1, 2, 1, source="GPTQ"), (64,), 512, generator)
        assert rounded_trial.takes(weight, torch.bfloat16) == is_taken


def test_a_weight_gets_its_power_where_the_trial_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make("int4")
    monkeypatch.setattr(rounded_trial, "multiplies_rounded", lambda device, form: False)
    assert rounded_trial.with_power(weight, INT4, torch.bfloat16) is weight
    monkeypatch.setattr(rounded_trial, "multiplies_rounded", lambda device, form: True)
    found = rounded_trial.with_power(weight, INT4, torch.bfloat16)
    assert found.power is not None
    assert float(found.power) == float(power_of(weight))
    assert rounded_trial.with_power(weight, INT4, torch.float32) is weight


def test_a_device_that_fails_the_trial_rounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:5")
    monkeypatch.setattr(rounded_trial, "has_warpgroups", lambda device: True)
    monkeypatch.setattr(rounded_trial, "multiplies_float8", lambda device: True)
    monkeypatch.setattr(rounded_trial, "trial_error", lambda device, form: torch.inf if form.source else 2e-2)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", False)
    assert rounded_trial.multiplies_rounded(device, INT4)
    assert not rounded_trial.multiplies_rounded(device, GGUF_FORMATS["Q4_K"])
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", True)
    assert rounded_trial.multiplies_rounded(device, GGUF_FORMATS["Q4_K"])
    monkeypatch.setattr(rounded_trial, "multiplies_float8", lambda device: False)
    assert not rounded_trial.multiplies_rounded(device, INT4)


def test_a_user_can_ask_for_products_that_round_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:7")
    monkeypatch.setattr(rounded_trial, "has_warpgroups", lambda device: True)
    monkeypatch.setattr(rounded_trial, "multiplies_float8", lambda device: True)
    monkeypatch.setattr(rounded_trial, "trial_error", lambda device, form: 2e-2)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", False)
    monkeypatch.setenv("MGPU_FLOAT8_ROUNDING", "0")
    assert not rounded_trial.multiplies_rounded(device, INT4)
    monkeypatch.setenv("MGPU_FLOAT8_ROUNDING", "1")
    assert rounded_trial.multiplies_rounded(device, INT4)


def test_rows_decide_whether_weights_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(rows: Float8Rows, weight: PackedWeight) -> UnscaledProduct:
        return UnscaledProduct(torch.ones(len(rows.values), 64), 2 * torch.ones(len(rows.values)))

    weight = replace(make("Q4_K"), power=torch.ones(1))
    monkeypatch.setattr(choose, "rounded_product", unscaled)
    monkeypatch.setattr(choose, "quantize_rows", quantize_plainly)
    monkeypatch.setattr(choose, "_group_matmul", lambda x, weight, bias: "whole")
    monkeypatch.setattr(blocks_trial, "blocks_product", lambda device, name: None)
    x_TK, bias_N = torch.zeros(70, 512).bfloat16(), torch.ones(64)
    assert choose.quantized_matmul(x_TK[:64], weight) == "whole"
    assert float(choose.quantized_matmul(x_TK[:65], weight).max()) == 2
    assert float(choose.quantized_matmul(x_TK, weight, bias_N).max()) == 3
    assert choose.quantized_matmul(x_TK, replace(weight, power=None)) == "whole"


def test_many_rows_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(rounded_product, "dequantize_float8", lambda weight: made.append(1))
    monkeypatch.setattr(rounded_product, "multiply_float8", lambda rows, weight, scale: float(scale))
    weight = replace(make("Q4_K"), power=torch.tensor([8.0]))
    rows = Float8Rows(torch.zeros(rounded_product.MOST_ROWS + 1, 512), torch.ones(1))
    assert rounded_product.rounded_product(rows, weight) == 0.125
    assert made == [1]


def test_layers_multiply_many_rows_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    power = torch.ones(1)
    monkeypatch.setattr(linear, "held_weight", lambda weight, form, dtype: replace(weight, power=power))
    layer = linear.Linear(512, 64, False, linear.Storage(torch.bfloat16, CPU, INT4))
    layer.init_dummy(torch.Generator())
    assert not layer.takes_float8(512)
    layer.finalize()
    assert [layer.takes_float8(rows) for rows in (64, 65, 512)] == [False, True, True]


@pytest.mark.parametrize("octets", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(("rows", "outputs"), list(itertools.product((65, 129, 512), (1024, 28672))))
def test_rings_and_parts_fit(rows: int, outputs: int, octets: int) -> None:
    tiling = choose_tiling(rows, outputs, 4096, octets)
    results = 2 * 2304  # each warpgroup changes their layout
    ring = tiling.stages * (tiling.block_m * 128 + tiling.block_n * 16 * octets)
    assert ring + results <= 227 << 10
    assert tiling.stages >= 4
    assert HOPPER_SMS * 2 * tiling.block_m * tiling.block_n <= default_workspace(CPU).partials.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4", *NAMES])
def test_products_equal_those_of_rounded_weights_and_rows(name: str) -> None:
    device = hopper()
    sizes = ((208, 512), (1024, 4096), (320, 1280), (12288, 512))
    for (outputs, inputs), rows in itertools.product(sizes, (1, 65, 130, 257, 512, rounded_product.MOST_ROWS + 3)):
        weight = make(name, outputs, inputs, device)
        weight = replace(weight, power=power_of(weight))
        x = torch.randn(rows, inputs, device=device).bfloat16()
        full = dequantize(weight, torch.float32)
        rounded, exact = round_rows(x) @ round_dense(full).T, x.float() @ full.T
        products = [rounded_product.rounded_product(quantize_rows(x), weight)]
        if rows <= 512:
            tilings = [RoundedTiling(block_m, 128, 4) for block_m in (128, 256)]
            products += [rounded_gemm(quantize_rows(x), weight, tiling=tiling) for tiling in tilings]
        for product in products:
            found = product.scaled().float()
            assert relative_error(found, rounded) < 5e-2
            assert relative_error(found, exact) < 1.2 * relative_error(rounded, exact) + 1e-2
