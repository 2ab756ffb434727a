import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernels.kernel_checks import relative_error, tolerance
from mgpu.protocol.model.facts import Activation
from mgpu.protocol.model.quantization import Quant, weight_format
from mgpu.worker.kernels.products.choose import matmul, quantized_matmul
from mgpu.worker.kernels.products.dequantize import dequantize_packed
from mgpu.worker.kernels.products.gemv import GemvTiling, choose_tiling, gemv
from mgpu.worker.kernels.products.quantized_gemm import Tiling, quantized_gemm
from mgpu.worker.kernels.products.quantized_gemv import QuantizedGemvTiling, quantized_gemv
from mgpu.worker.kernels.reference import gated_activation
from mgpu.worker.kernels.runtime import Workspace
from mgpu.worker.layers.products.choose import quantized_matmul as plain_quantized_matmul
from mgpu.worker.quantization.packing import PackedWeight, dequantize, pack_fp8, pack_int4, pack_int8
from mgpu.worker.quantization.quantize import quantize


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def test_split_products_are_repeatable(device: torch.device) -> None:
    weight, _ = random_weight("int8", 64, 1024, device)
    x = draw(3, 1024, device=device)
    first, second = (quantized_gemm(x, weight, tiling=Tiling(64, 4)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "scratch", [(3 * 64 * 16, 4), (1, 4), (1 << 16, 0)], ids=["three parts", "none", "no counters"]
)
def test_a_product_is_split_into_no_more_parts_than_the_scratch_holds(
    device: torch.device, scratch: tuple[int, int]
) -> None:
    weight, values = random_weight("int8", 64, 1024, device)
    x, workspace = draw(3, 1024, device=device), Workspace.create(device, *scratch)
    got = quantized_gemm(x, weight, tiling=Tiling(64, 4), workspace=workspace)
    assert relative_error(got, F.linear(x, values)) < tolerance(torch.float32)


def test_more_rows_than_a_kernel_takes_are_refused(device: torch.device) -> None:
    weight, _ = random_weight("int8", 64, 128, device)
    with pytest.raises(ValueError, match="1 to 256 rows of 128, got 257 of 128"):
        quantized_gemm(draw(257, 128, device=device), weight)


@pytest.mark.parametrize("rows", [1, 2, 65])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4-64"])
def test_quantized_matmul_serves_any_number_of_rows(device: torch.device, rows: int, kind: str) -> None:
    weight, values = random_weight(kind, 40, 320, device)
    x, bias = draw(rows, 320, device=device), draw(40, device=device)
    got = quantized_matmul(x, weight, bias)
    assert relative_error(got, F.linear(x, values, bias)) < 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 65])
@pytest.mark.parametrize("quant", ["8", "4", "fp8"])
def test_a_layer_quantized_while_loading_gives_the_plain_product(
    device: torch.device, quant: Quant, rows: int, dtype: torch.dtype
) -> None:
    weight = quantize(draw(40, 320, device=device), weight_format(quant))
    x, bias = draw(rows, 320, device=device, dtype=dtype), draw(40, device=device, dtype=dtype)
    plain = plain_quantized_matmul(x.float(), weight, bias.float())
    assert relative_error(quantized_matmul(x, weight, bias), plain) < max(3e-5, tolerance(dtype))


@pytest.mark.parametrize("rows", [1, 3])
def test_matmul_serves_any_number_of_rows(device: torch.device, rows: int) -> None:
    x, w, bias = (draw(*shape, device=device) for shape in ((rows, 320), (40, 320), (40,)))
    assert relative_error(matmul(x, w, bias), F.linear(x, w, bias)) < tolerance(torch.float32)


def stored(numbers: Tensor) -> Tensor:
    """Round to what int4 keeps of scales and offsets."""
    return numbers.bfloat16().float()


def random_weight(kind: str, n: int, k: int, device: torch.device) -> tuple[PackedWeight, Tensor]:
    """Return a packed weight and its float32 values."""
    if kind.startswith("int4"):
        group = int(kind.removeprefix("int4-"))
        q = torch.randint(-8, 8, (n, k), device=device)
        scales, offsets = (stored(draw(n, -(-k // group), device=device)) for _ in range(2))
        wide_scales, wide_offsets = (each.repeat_interleave(group, 1)[:, :k] for each in (scales, offsets))
        return pack_int4(q, scales, offsets, group), q * wide_scales + wide_offsets
    scales = torch.rand(n, device=device)
    if kind == "int8":
        q8 = torch.randint(-128, 128, (n, k), device=device, dtype=torch.int8)
        return pack_int8(q8, scales), q8 * scales[:, None]
    f8 = draw(n, k, device=device).to(torch.float8_e4m3fn)
    return pack_fp8(f8, scales), f8.float() * scales[:, None]


KINDS = ["int8", "fp8", "int4-32", "int4-64", "int4-128"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [256, 576])
def test_packed_weights_dequantize_to_their_values(device: torch.device, kind: str, k: int) -> None:
    weight, values = random_weight(kind, 5, k, device)
    assert torch.equal(dequantize(weight, torch.float32), values)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize_packed(weight, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiling", [None, Tiling(64, 2), Tiling(32, 1, 2)])
def test_quantized_gemm_equals_product_with_dequantized_weight(
    device: torch.device, dtype: torch.dtype, kind: str, tiling: Tiling | None
) -> None:
    rng = random.Random(f"{kind}{tiling}")
    rows, n, k = rng.choice([1, 4, 16]), rng.choice([64, 70]), rng.choice([256, 576])
    weight, values = random_weight(kind, n, k, device)
    x, bias = draw(rows, k, device=device, dtype=dtype), draw(n, device=device, dtype=dtype)
    got = quantized_gemm(x, weight, bias_N=bias, tiling=tiling)
    assert relative_error(got, F.linear(x.float(), values, bias.float())) < tolerance(dtype)


@pytest.mark.parametrize("kind", ["int8", "int4-32"])
@pytest.mark.parametrize(("rows", "tiling"), [(65, None), (40, Tiling(64, 2, 2, num_stages=2, most_rows=32))])
def test_quantized_gemm_cuts_many_rows_into_tiles(
    device: torch.device, kind: str, rows: int, tiling: Tiling | None
) -> None:
    weight, values = random_weight(kind, 70, 576, device)
    x, bias = draw(rows, 576, device=device), draw(70, device=device)
    for _ in range(2):  # counters of splits are zero again
        got = quantized_gemm(x, weight, bias_N=bias, tiling=tiling)
        assert relative_error(got, F.linear(x, values, bias)) < tolerance(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4-32", "int4-64", "int4-128"])
@pytest.mark.parametrize(("n", "k", "ahead"), [(70, 256, True), (9, 1088, False)])
def test_quantized_gemv_equals_product_with_dequantized_weight(
    device: torch.device, dtype: torch.dtype, kind: str, n: int, k: int, ahead: bool
) -> None:
    weight, values = random_weight(kind, n, k, device)
    x, bias = draw(1, k, device=device, dtype=dtype), draw(n, device=device, dtype=dtype)
    got = quantized_gemv(x, weight, bias_N=bias, tiling=QuantizedGemvTiling(8, 128, 1, ahead))
    assert relative_error(got, F.linear(x.float(), values, bias.float())) < 3 * tolerance(dtype)


@pytest.mark.parametrize(
    ("n", "k", "tiling"),
    [
        (3072, 4096, GemvTiling(2, 4096, 4)),
        (4096, 2048, GemvTiling(4, 1024, 2)),
        (4096, 7168, GemvTiling(4, 1024, 1)),
        (6144, 4096, GemvTiling(2, 2048, 4)),
        (4096, 4096, GemvTiling(2, 1024, 1)),
        (4096, 14336, GemvTiling(2, 1024, 1)),
        (2048, 4096, GemvTiling(2, 2048, 2)),
        (1024, 3072, GemvTiling(2, 1024, 1)),
    ],
)
def test_tiles_of_one_row_are_those_that_were_measured(n: int, k: int, tiling: GemvTiling) -> None:
    assert choose_tiling(n, k, gated=False) == tiling


@pytest.mark.parametrize("kind", ["fp8", "int4-32"])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_quantized_gemv_gates_its_outputs(device: torch.device, kind: str, gate: Activation) -> None:
    weight, values = random_weight(kind, 2 * 37, 256, device)
    x, bias = draw(1, 256, device=device), draw(2 * 37, device=device)
    got = quantized_gemv(x, weight, gate=gate, bias_N=bias, tiling=QuantizedGemvTiling(8, 128, 1))
    assert relative_error(got, gated_activation(F.linear(x, values, bias), gate == "silu")) < 3 * tolerance(
        torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(70, 256), (33, 576)])
def test_gemv_adds_a_bias_and_gates_its_outputs(device: torch.device, dtype: torch.dtype, n: int, k: int) -> None:
    tiling = GemvTiling(8, 128, 4)
    x, w, bias = (draw(*shape, device=device, dtype=dtype) for shape in ((1, k), (2 * n, k), (2 * n,)))
    sums = F.linear(x.float(), w.float(), bias.float())
    assert relative_error(gemv(x, w, bias_N=bias, tiling=tiling), sums) < tolerance(dtype)
    gates: tuple[Activation, ...] = ("silu", "gelu_tanh")
    for gate in gates:
        got = gemv(x, w, gate=gate, bias_N=bias, tiling=tiling)
        assert relative_error(got, gated_activation(sums, gate == "silu")) < tolerance(dtype)
