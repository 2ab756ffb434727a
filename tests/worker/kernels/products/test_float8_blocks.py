"""Products with FP8 blocks of 128 x 128 (W8A8): rows are quantized block by block, and the product is the library's."""

import itertools

import pytest
import torch

from harness.kernels.kernel_checks import relative_error
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.layers.float8_quantize import quantize_blocks
from mgpu.worker.kernels.products import choose, float8_blocks
from mgpu.worker.kernels.runtime import LAUNCH_MODE
from mgpu.worker.quantization import float8_rows
from mgpu.worker.quantization.float8_rows import Float8Blocks
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.random_packed import random_packed

BLOCKS = WeightFormat("fp8", 128, 128, 4, source="blocks")
ROUNDING = 0.032
BF16_ROUNDING = 5e-3


def plain_product(rows: Float8Blocks, weight: PackedWeight) -> torch.Tensor:
    """Multiply as the library does, by the values that the bytes stand for, in the order of words."""
    scales = weight.scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    weights = weight.words.view(torch.float8_e4m3fn).float() * scales
    return ((rows.values.float() * rows.scale_TB.repeat_interleave(128, 1)) @ weights.T).bfloat16()


def weight_of(outputs: int, inputs: int, device: torch.device) -> PackedWeight:
    weight = random_packed(BLOCKS, (outputs,), inputs, torch.Generator(device).manual_seed(0))
    weight.scales.mul_(torch.rand_like(weight.scales) + 0.5)
    return weight


@pytest.mark.parametrize("k", [96, 128, 1100, 8192])
def test_blocks_of_rows_are_quantized_as_the_reference_does(device: torch.device, k: int) -> None:
    x = (torch.randn(5, k, device=device) * torch.logspace(-2, 3, 5, device=device)[:, None]).bfloat16()
    x[3] = 0
    x[:, : k // 2] *= 1000
    got, expected = quantize_blocks(x), float8_rows.quantize_blocks(x)
    assert got.scale_TB.stride(0) == expected.scale_TB.stride(0) == 1
    assert got.scale_TB.shape == expected.scale_TB.shape == (16, -(-k // 128))
    assert torch.equal(got.scale_TB[:5], expected.scale_TB[:5])
    assert torch.equal(got.values.view(torch.uint8)[:5], expected.values.view(torch.uint8)[:5])
    assert relative_error(float8_rows.round_blocks(x), x) < ROUNDING
    alone = quantize_blocks(x[1:2])
    assert torch.equal(alone.values.view(torch.uint8)[0], got.values.view(torch.uint8)[1])


def test_a_product_in_blocks_is_that_of_rounded_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(float8_blocks, "scaled_product", plain_product)
    elif not float8_blocks.multiplies_blocks(device):
        pytest.skip("this GPU has no float8 products in blocks")
    assert float8_blocks.trial_error(device, float8_blocks._library_product) < BF16_ROUNDING
    weight, x = weight_of(256, 512, device), torch.randn(20, 512, device=device).bfloat16()
    bias = torch.randn(256, device=device).bfloat16()
    got = float8_blocks.block_product(x, weight, bias)
    assert 0 < relative_error(got, x.float() @ dequantize(weight, torch.float32).T + bias) < ROUNDING


def test_many_rows_are_multiplied_in_blocks_where_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def product(given: Float8Blocks, weight: PackedWeight) -> torch.Tensor:
        rows.append(len(given.values))
        return plain_product(given, weight)

    monkeypatch.setattr(float8_blocks, "scaled_product", product)
    monkeypatch.setattr(float8_blocks, "quantize_blocks", float8_rows.quantize_blocks)
    weight = weight_of(128, 512, torch.device("cpu"))
    for count, works in ((float8_blocks.LEAST_ROWS, True), (float8_blocks.LEAST_ROWS - 1, True), (300, False)):
        monkeypatch.setattr(choose, "multiplies_blocks", lambda device, works=works: works)
        x = torch.randn(count, 512).bfloat16()
        got = choose.quantized_matmul(x, weight)
        assert relative_error(got, x.float() @ dequantize(weight, torch.float32).T) < ROUNDING
    assert rows == [32]  # whole units of 16


@pytest.mark.parametrize(
    ("form", "outputs", "inputs", "dtype", "taken"),
    [
        (BLOCKS, 128, 512, torch.bfloat16, True),
        (BLOCKS, 128, 512, torch.float32, False),
        (BLOCKS, 128, 384, torch.bfloat16, False),  # scales of a row that do not fill 16 bytes
        (BLOCKS, 192, 512, torch.bfloat16, False),
        (WeightFormat("fp8", 128, 128, 2, source="x"), 128, 512, torch.bfloat16, False),
        (WeightFormat("fp8", 128, 16, 4, source="x"), 128, 512, torch.bfloat16, False),
        (WeightFormat("fp8", source="x"), 128, 512, torch.bfloat16, False),
        (WeightFormat("8", 128, 128, 4, source="x"), 128, 512, torch.bfloat16, False),
    ],
)
def test_only_whole_blocks_are_taken(
    form: WeightFormat, outputs: int, inputs: int, dtype: torch.dtype, taken: bool
) -> None:
    weight = random_packed(form, (outputs,), inputs, torch.Generator().manual_seed(0))
    assert float8_blocks.takes_blocks(weight, dtype) is taken


def test_a_library_without_such_products_leaves_them_weight_only(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:7")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(float8_blocks, "trial_error", lambda device, product: torch.inf)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", True)
    assert float8_blocks.multiplies_blocks(device)
    monkeypatch.setattr(LAUNCH_MODE, "compiles_only", False)
    assert not float8_blocks.multiplies_blocks(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not float8_blocks.multiplies_blocks(torch.device("cuda:6"))


def test_few_rows_have_an_own_product_where_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def own(rows: Float8Blocks, count: int, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        used.append("own")
        return plain_product(rows, weight)[:count]

    def library(rows: Float8Blocks, weight: PackedWeight) -> torch.Tensor:
        used.append("library")
        return plain_product(rows, weight)

    monkeypatch.setattr(float8_blocks, "scaled_product", library)
    monkeypatch.setattr(float8_blocks, "own_product", own)
    monkeypatch.setattr(float8_blocks, "quantize_blocks", float8_rows.quantize_blocks)
    weight, most = weight_of(128, 512, torch.device("cpu")), float8_blocks.OWN_ROWS
    for count, works in ((most, True), (most + 1, True), (most, False)):
        monkeypatch.setattr(float8_blocks, "has_own_product", lambda device, works=works: works)
        x = torch.randn(count, 512).bfloat16()
        got = float8_blocks.block_product(x, weight)
        assert relative_error(got, x.float() @ dequantize(weight, torch.float32).T) < ROUNDING
    assert used == ["own", "library", "library"]


@pytest.mark.gpu
def test_own_products_equal_the_librarys() -> None:
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not float8_blocks.has_own_product(device):
        pytest.skip("no Hopper GPU, which is the one that has warpgroups")
    for (outputs, inputs), count in itertools.product(((256, 512), (1024, 4096)), (1, 17, 40, 64, 100)):
        weight, x = weight_of(outputs, inputs, device), torch.randn(count, inputs, device=device).bfloat16()
        rows = quantize_blocks(x)
        expected = float8_blocks.scaled_product(rows, weight)[:count]
        assert relative_error(float8_blocks.own_product(rows, count, weight), expected) < BF16_ROUNDING
