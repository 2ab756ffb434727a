"""int8 weights whose groups have scales, by warpgroups: how they are widened, and when they are."""

import itertools

import pytest
import torch
from torch import Tensor

from harness.kernels.hopper import check_trial, hopper
from harness.kernels.kernel_checks import relative_error
from harness.kernels.ptx import run_ptx
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.products import choose
from mgpu.worker.kernels.products.group_gemm import most_rows
from mgpu.worker.kernels.products.warpgroup import octet_gemm, octet_trial
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.random_packed import random_packed

GPTQ = WeightFormat("8", 128, 1, 2, 1, source="GPTQ")


def weight_of(form: WeightFormat, outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    generator = torch.Generator(device).manual_seed(0)
    weight = random_packed(form, (outputs,), inputs, generator)
    if weight.zeros is not None:
        weight.zeros.random_(-8, 9, generator=generator)
    return weight


def twice(number: float) -> int:
    return int(torch.tensor(number).bfloat16().view(torch.uint16)) * 0x10001


def halves(word: int) -> list[float]:
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).tolist()


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("zero", [None, -128, 0, 127])
def test_a_part_of_two_words_is_widened_and_scaled(part: int, zero: int | None) -> None:
    octets = ((-128, -1, 0, 127), (1, 127, -127, -128))
    words = [int.from_bytes(bytes(each & 255 for each in four), "little") for four in octets]
    given = {"$1": words[0], "$2": words[1], "$3": twice(0.375), "$5": twice(float(zero or 0))}
    found = halves(run_ptx(octet_gemm.assembly(part, zero is not None), given)["$0"])
    exact = [(four[part] - (zero or 0)) * 0.375 for four in octets]
    assert found == torch.tensor(exact).bfloat16().tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("form", [GGUF_FORMATS["Q8_0"], GPTQ, WeightFormat("8", 64, 1, 2, source="x")], ids=str)
def test_products_equal_those_of_the_dequantized_weight(form: WeightFormat) -> None:
    device = hopper()
    for (outputs, inputs), rows in itertools.product(((200, 512), (1024, 4096)), (2, 64, 128, 300, 600)):
        weight, x = weight_of(form, outputs, inputs, device), torch.randn(rows, inputs, device=device).bfloat16()
        bias = torch.randn(outputs, device=device).bfloat16()
        expected = x.float() @ dequantize(weight, torch.float32).T + bias
        assert relative_error(octet_gemm.octet_gemm(x, weight, bias_N=bias), expected) < 5e-3


@pytest.mark.parametrize(("rows", "outputs"), list(itertools.product((17, 64, 65, 128, 129, 384, 4096), (1024, 28672))))
def test_the_rings_fit_into_shared_memory(rows: int, outputs: int) -> None:
    tiling = octet_gemm.choose_tiling(rows, outputs, 4096)
    assert tiling.word_stages * 128 * 128 + tiling.row_stages * tiling.block_m * 128 <= (227 << 10) - 1024


def test_many_rows_are_multiplied_by_warpgroups_where_that_works(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    counts: list[int] = []

    def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        counts.append(len(x))
        return x @ dequantize(weight, x.dtype).T

    form = WeightFormat("8", 128, 1, 2, source="x")
    weight, least = weight_of(form, 16, 256, device), octet_trial.LEAST_ROWS
    for count, found in ((least, product), (least - 1, product), (least, None), (octet_trial.MOST_ROWS + 1, product)):
        monkeypatch.setattr(octet_trial, "groups_product", lambda device, found=found: found)
        x = torch.randn(count, 256, device=device).bfloat16()
        assert (
            relative_error(choose.quantized_matmul(x, weight), x.float() @ dequantize(weight, torch.float32).T) < 1e-2
        )
    assert counts == [least]


def test_a_head_is_multiplied_at_once_by_as_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(GGUF_FORMATS["Q8_0"], 16, 256, torch.device("cpu"))
    monkeypatch.setattr(octet_trial, "groups_product", lambda device: None)
    assert choose.most_rows_at_once(weight, torch.bfloat16) == most_rows(weight)
    monkeypatch.setattr(octet_trial, "groups_product", lambda device: "product")
    assert choose.most_rows_at_once(weight, torch.bfloat16) == octet_trial.MOST_ROWS
    assert choose.most_rows_at_once(weight, torch.float16) == most_rows(weight)


@pytest.mark.parametrize(
    ("form", "dtype", "taken"),
    [
        (GPTQ, torch.bfloat16, True),
        (GPTQ, torch.float16, False),
        (GGUF_FORMATS["Q8_0"], torch.bfloat16, True),
        (WeightFormat("8", 128, 1, 2, 1, True, source="act-order"), torch.bfloat16, False),
        (WeightFormat("8", 128, 128, 4, source="blocks"), torch.bfloat16, False),
        (WeightFormat("8", 16, 1, 2, source="x"), torch.bfloat16, False),
        (WeightFormat("8", source="x"), torch.bfloat16, False),
        (WeightFormat("fp8", 128, 1, 2, source="x"), torch.bfloat16, False),
    ],
)
def test_groups_of_whole_parts_are_taken(form: WeightFormat, dtype: torch.dtype, taken: bool) -> None:
    weight = random_packed(form, (128,), 512, torch.Generator().manual_seed(0))
    assert octet_trial.takes_groups(weight, dtype) is taken


def test_a_device_that_fails_the_trial_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trial(monkeypatch, octet_trial, "groups_product", (8, 9))
