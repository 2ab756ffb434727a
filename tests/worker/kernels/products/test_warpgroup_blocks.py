"""GGUF's words in products by warpgroups: what their inline assembly computes, and when they are used."""

import itertools

import pytest
import torch

from harness.kernels.hopper import hopper
from harness.kernels.kernel_checks import relative_error
from harness.kernels.ptx import run_ptx
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.worker.kernels.products import choose
from mgpu.worker.kernels.products.warpgroup import blocks_trial, gemm, trial
from mgpu.worker.kernels.products.warpgroup.blocks import assembly_of, kind_of, table_assembly
from mgpu.worker.kernels.runtime import LAUNCH_MODE
from mgpu.worker.quantization.packing import NL4, PackedWeight, dequantize
from mgpu.worker.quantization.random_packed import random_packed

NAMES = ("IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K")
CPU = torch.device("cpu")


def make(name: str, outputs: int = 64, inputs: int = 512, device: torch.device = CPU) -> PackedWeight:
    return random_packed(GGUF_FORMATS[name], (outputs,), inputs, torch.Generator(device).manual_seed(0))


def doubled(number: float) -> int:
    return int(torch.tensor(number).bfloat16().view(torch.uint16)) * 0x10001


def halves(word: int) -> list[float]:
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).tolist()


@pytest.mark.parametrize("has_offset", [True, False])
@pytest.mark.parametrize("byte", range(4))
@pytest.mark.parametrize(("bits", "scale"), [(2, 0.5), (3, -0.03), (5, 0.0371), (6, 0.0371), (6, -1.25), (6, 2e-5)])
def test_codes_are_put_together_and_scaled(byte: int, bits: int, scale: float, has_offset: bool) -> None:
    near, middle, upper = float(torch.tensor(scale).bfloat16()), 1 << bits - 1, [0, 0]
    factors = [doubled(near * 2.0**117)] * 2 + [doubled(-middle * near / 65536)] * 2 * has_offset
    if bits > 4:
        words, lowest, upper = [0x1F3A5C7E, 0xE081D4F2], 4, [0xD2E4, 0x1B87] if bits == 6 else [0xB2, 0x4D]
        given = [*words, upper[0] | upper[1] << 16, *factors]
    else:
        words, lowest = [0xD2E4, 0x1B87], 2
        given = [words[0] | words[1] << 16, *factors]
        if bits == 3:
            upper = [0xB2, 0x4D]
            given.insert(1, upper[0] | upper[1] << 16)
    found = run_ptx(
        assembly_of(byte, bits, has_offset), {f"${2 + index}": number for index, number in enumerate(given)}
    )
    for part, name in ((2 * byte, "$0"), (2 * byte + 1, "$1")):
        width = bits - lowest
        codes = [
            (word >> lowest * part & (1 << lowest) - 1) | (high >> width * part & (1 << width) - 1) << lowest
            for word, high in zip(words, upper, strict=True)
        ]
        exact = torch.tensor([(code - middle) * near for code in codes]).bfloat16().tolist()
        assert [number * 65536 for number in halves(found[name])] == exact  # rounded once


@pytest.mark.parametrize("byte", range(4))
def test_codes_choose_from_the_table(byte: int) -> None:
    words, near = (0x1F3A5C7E, 0xE081D4F2), float(torch.tensor(-0.0371).bfloat16())
    found = run_ptx(table_assembly(byte), {"$2": words[0], "$3": words[1], "$4": doubled(near / 65536)})
    for part, name in ((2 * byte, "$0"), (2 * byte + 1, "$1")):
        exact = torch.tensor([NL4[word >> 4 * part & 15] * near for word in words]).bfloat16().tolist()
        assert [number * 65536 for number in halves(found[name])] == exact


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_types_of_up_to_six_bits_are_taken(name: str) -> None:
    weight = make(name)
    assert blocks_trial.type_of(weight, torch.bfloat16) == (name if name in NAMES else "")
    assert blocks_trial.type_in(GGUF_FORMATS[name]) == (name if name in NAMES else "")
    assert not blocks_trial.type_of(weight, torch.float16)
    assert not blocks_trial.type_of(make(name, inputs=512 + 32 if name in ("Q4_1", "Q5_0") else 512), torch.float32)
    if name in NAMES:
        assert kind_of(weight) == 2


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0"])
def test_rows_that_are_no_whole_blocks_of_words_are_not_taken(name: str) -> None:
    assert not blocks_trial.type_of(make(name, inputs=544), torch.bfloat16)


def test_rows_bits_and_outputs_decide_which_product_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_trial, "blocks_product", lambda device, name: name)
    for name, outputs, most in (("Q4_K", 64, 128), ("Q6_K", 8200, 128), ("Q4_K", 8200, 256), ("Q4_1", 8200, 256)):
        weight = make(name, outputs, 256)
        found = [choose._warpgroup_product(rows, weight, torch.bfloat16) for rows in (2, most, most + 1)]
        assert found == [name, name, None]


def test_a_type_that_fails_its_trial_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:7")
    monkeypatch.setattr(trial, "words_product", lambda device: "words")
    monkeypatch.setattr(blocks_trial, "trial_error", lambda device, name, _: torch.inf if name == "Q4_K" else 3e-3)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", False)
    assert blocks_trial.blocks_product(device, "Q4_K") is None
    assert blocks_trial.blocks_product(device, "Q6_K") == "words"
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", True)
    assert blocks_trial.blocks_product(device, "Q4_K") == "words"
    monkeypatch.setattr(trial, "words_product", lambda device: None)
    assert blocks_trial.blocks_product(device, "Q6_K") is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_products_equal_those_of_the_dequantized_weight(name: str) -> None:
    device = hopper()
    sizes, counts = ((200, 512), (1024, 4096), (320, 1280)), (1, 7, 16, 40, 64, 100)
    for (outputs, inputs), rows in itertools.product(sizes, counts):
        weight = make(name, outputs, inputs, device)
        x, bias = torch.randn(rows, inputs, device=device).bfloat16(), torch.randn(outputs, device=device).bfloat16()
        expected = x.float() @ dequantize(weight, torch.float32).T
        assert relative_error(gemm.warpgroup_gemm(x, weight), expected) < 5e-3
        assert relative_error(gemm.warpgroup_gemm(x, weight, bias_N=bias), expected + bias) < 5e-3
