"""Products of one row by dot products of bytes equal plain torch, and their inline assembly does what it says."""

import random
from collections.abc import Sequence

import pytest
import torch

from harness.kernels.kernel_checks import relative_error
from harness.kernels.ptx import run_ptx
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.products.integer_dots import DOT_2, DOT_3, DOT_4, DOT_5, DOT_6, DOT_NL4, PACK
from mgpu.worker.kernels.products.integer_gemv import (
    IntegerGemvTiling,
    choose_tiling,
    integer_gemv,
    takes_integers,
)
from mgpu.worker.quantization.packing import NL4, PackedWeight, dequantize, pack_int4
from mgpu.worker.quantization.random_packed import random_packed

GPTQ = WeightFormat("4", 128, 1, 2, 1, source="GPTQ")
FORMS = {
    "pairs": None,
    "GPTQ": GPTQ,
    "Q4_K": GGUF_FORMATS["Q4_K"],
    "Q4_0": GGUF_FORMATS["Q4_0"],
    "Q6_K": GGUF_FORMATS["Q6_K"],
    "Q5_K": GGUF_FORMATS["Q5_K"],
    "Q5_0": GGUF_FORMATS["Q5_0"],
    "Q5_1": GGUF_FORMATS["Q5_1"],
    "Q3_K": GGUF_FORMATS["Q3_K"],
    "Q2_K": GGUF_FORMATS["Q2_K"],
    "IQ4_XS": GGUF_FORMATS["IQ4_XS"],
    "IQ4_NL": GGUF_FORMATS["IQ4_NL"],
}


def make(form: WeightFormat | None, outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    generator = torch.Generator(device).manual_seed(0)
    if form is None:
        q = torch.randint(-8, 8, (outputs, inputs), generator=generator, device=device)
        numbers = (torch.randn(outputs, -(-inputs // 32), generator=generator, device=device) for _ in range(2))
        return pack_int4(q, *numbers, 32)
    weight = random_packed(form, (outputs,), inputs, generator)
    if weight.zeros is not None:
        weight.zeros.random_(-8, 9, generator=generator)
    return weight


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("inputs", [96, 512])
def test_products_equal_those_of_the_dequantized_weight(name: str, inputs: int, device: torch.device) -> None:
    if inputs % 256 and FORMS[name]:
        pytest.skip("a row of this form has whole blocks")
    weight = make(FORMS[name], 12, inputs, device)
    x = torch.randn(1, inputs, device=device)
    x[:, ::32] *= 50  # the largest of a run says how the others are rounded
    expected = x @ dequantize(weight, torch.float32).T
    assert relative_error(integer_gemv(x, weight), expected) < 2e-4
    narrow = x.bfloat16()
    assert relative_error(integer_gemv(narrow, weight), narrow.float() @ dequantize(weight, torch.float32).T) < 4e-3


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("inputs", "words"), [(512, 32), (1280, 64)])
def test_steps_that_are_loaded_ahead_give_the_same_sums(
    name: str, inputs: int, words: int, device: torch.device
) -> None:
    weight = make(FORMS[name], 8, inputs, device)  # 512 inputs are two steps of 32 words, 1280 two and a half of 64
    x = torch.randn(1, inputs, device=device).bfloat16()
    first, ahead = (integer_gemv(x, weight, tiling=IntegerGemvTiling(4, words, 1, ahead)) for ahead in (False, True))
    assert torch.equal(first, ahead)
    assert relative_error(first, x.float() @ dequantize(weight, torch.float32).T) < 4e-3


@pytest.mark.parametrize(
    ("outputs", "inputs", "tiling"),
    [
        (28672, 4096, IntegerGemvTiling(8, 256, 2)),
        (4096, 14336, IntegerGemvTiling(8, 512, 4)),
        (4096, 4096, IntegerGemvTiling(8, 512, 2)),
        (6144, 4096, IntegerGemvTiling(8, 512, 4)),
    ],
)
def test_tiles_are_those_that_were_measured(outputs: int, inputs: int, tiling: IntegerGemvTiling) -> None:
    words, pairs = torch.empty(outputs, inputs // 8, dtype=torch.int32), torch.empty(outputs, inputs // 32)
    weight = PackedWeight("int4", words, pairs.to(torch.int32), inputs, 32)
    assert choose_tiling(weight) == tiling
    assert takes_integers(weight, torch.bfloat16)


def test_gate_and_bias_are_those_of_other_products(device: torch.device) -> None:
    weight = make(None, 16, 256, device)
    x, bias = torch.randn(1, 256, device=device), torch.randn(16, device=device)
    sums = x @ dequantize(weight, torch.float32).T + bias
    expected = torch.nn.functional.silu(sums[:, :8]) * sums[:, 8:]
    assert relative_error(integer_gemv(x, weight, gate="silu", bias_N=bias), expected) < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float, device: torch.device) -> None:
    x = torch.ones(1, 256, device=device)
    x[0, 77] = bad
    assert not integer_gemv(x, make(None, 16, 256, device)).isfinite().any()


def test_zeros_give_zeros(device: torch.device) -> None:
    assert not integer_gemv(torch.zeros(1, 256, device=device), make(None, 16, 256, device)).any()


def packed(numbers: list[int]) -> list[int]:
    """Return pairs of integers, of the parts 0 and 2, 4 and 6, 1 and 3, 5 and 7."""
    found = []
    for first in (0, 1):
        given = {f"${2 + place}": numbers[2 * place + first] & 0xFFFFFFFF for place in range(4)}
        pairs = run_ptx(PACK.value, given)
        found += [pairs["$0"], pairs["$1"]]
    return found


def numbered(given: Sequence[int], first: int) -> dict[str, int]:
    return {f"${index}": number for index, number in enumerate(given, first)}


@pytest.mark.parametrize("kind", ["int4", "int5", "nl4"])
def test_a_word_is_multiplied_by_integers_of_16_bits(kind: str) -> None:
    draw = random.Random(0)
    for _ in range(20):
        word, upper, numbers = (
            draw.getrandbits(32),
            draw.getrandbits(8),
            [draw.randint(-32000, 32000) for _ in range(8)],
        )
        codes = [word >> 4 * part & 15 for part in range(8)]
        if kind == "nl4":
            codes = [NL4[code] for code in codes]
        if kind == "int5":
            codes = [code | (upper >> part & 1) << 4 for part, code in enumerate(codes)]
        expected = sum(code * number for code, number in zip(codes, numbers, strict=True))
        text = {"int4": DOT_4, "int5": DOT_5, "nl4": DOT_NL4}[kind].value
        assert run_ptx(text, numbered([word, upper, *packed(numbers)], 1))["$0"] == expected & 0xFFFFFFFF


@pytest.mark.parametrize("kind", ["int2", "int3"])
def test_the_halves_of_short_words_are_multiplied_apart(kind: str) -> None:
    draw = random.Random(0)
    for _ in range(20):
        word, upper, numbers = (
            draw.getrandbits(32),
            draw.getrandbits(8),
            [draw.randint(-32000, 32000) for _ in range(8)],
        )
        codes = [word >> 2 * part & 3 for part in range(8)]
        if kind == "int3":
            codes = [code | (upper >> part & 1) << 2 for part, code in enumerate(codes)]
        products = [code * number for code, number in zip(codes, numbers, strict=True)]
        found = run_ptx((DOT_3 if kind == "int3" else DOT_2).value, numbered([word, upper, *packed(numbers)], 2))
        assert [found["$0"], found["$1"]] == [sum(half) & 0xFFFFFFFF for half in (products[:4], products[4:])]


def test_the_halves_of_words_of_six_bits_are_multiplied_apart() -> None:
    draw = random.Random(0)
    for _ in range(20):
        words, upper = [draw.getrandbits(32) for _ in range(2)], draw.getrandbits(32)
        numbers = [[draw.randint(-32000, 32000) for _ in range(8)] for _ in words]
        pairs = [packed(each) for each in numbers]
        given = [*words, upper, *(pairs[word][place] for place in range(4) for word in range(2))]
        found = run_ptx(DOT_6.value, numbered(given, 4))
        for word in range(2):
            codes = [words[word] >> 4 * part & 15 | (upper >> 16 * word + 2 * part & 3) << 4 for part in range(8)]
            products = [code * number for code, number in zip(codes, numbers[word], strict=True)]
            assert found[f"${word}"] == sum(products[:4]) & 0xFFFFFFFF
            assert found[f"${2 + word}"] == sum(products[4:]) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("form", "dtype", "taken"),
    [
        (GPTQ, torch.bfloat16, True),
        (GPTQ, torch.float32, False),
        (WeightFormat("4", 128, 1, 2, 1, True, source="act-order"), torch.bfloat16, False),
        (WeightFormat("8", 128, 1, 2, 1, source="x"), torch.bfloat16, False),
        (GGUF_FORMATS["Q4_1"], torch.float16, True),
        (GGUF_FORMATS["Q3_K"], torch.bfloat16, True),
        (GGUF_FORMATS["IQ4_NL"], torch.bfloat16, True),
        (GGUF_FORMATS["Q8_0"], torch.bfloat16, False),
        (GGUF_FORMATS["MXFP4"], torch.bfloat16, False),
    ],
)
def test_integers_with_narrow_activations_are_taken(form: WeightFormat, dtype: torch.dtype, taken: bool) -> None:
    weight = random_packed(form, (256,), 256, torch.Generator().manual_seed(0))
    assert takes_integers(weight, dtype) is taken


def test_scales_of_whole_rows_are_not_taken() -> None:
    weight = PackedWeight("int4", torch.zeros(1040, 32, dtype=torch.int32), torch.ones(1040, 1), 256, 0)
    assert not takes_integers(weight, torch.bfloat16)
