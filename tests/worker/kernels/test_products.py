import random

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import relative_error, tolerance
from torch import Tensor

from mgpu.worker.kernels.gemv import GemvTiling, gemv
from mgpu.worker.kernels.packing import PackedWeight, dequantize, pack_fp8, pack_int4, pack_int8
from mgpu.worker.kernels.quantized_gemm import quantized_gemm
from mgpu.worker.kernels.quantized_gemv import quantized_gemv
from mgpu.worker.kernels.reference import gated_activation
from mgpu.worker.kernels.small_gemm import MAX_ROWS, Tiling, small_gemm

TILINGS = [
    None,
    Tiling(64, 64, 4),
    Tiling(64, 128, 3, bulk=True),
    Tiling(32, 64, 2, 2, narrow=True),
]


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 70, 256), (5, 128, 320), (16, 64, 576)])
def test_small_gemm_equals_linear(
    device: torch.device, dtype: torch.dtype, tiling: Tiling | None, rows: int, n: int, k: int
) -> None:
    x, w, bias = (draw(*shape, device=device, dtype=dtype) for shape in ((rows, k), (n, k), (n,)))
    got = small_gemm(x, w, bias_N=bias, tiling=tiling)
    assert relative_error(got, F.linear(x.float(), w.float(), bias.float())) < tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the interpreter has no float8 dot")
def test_small_gemm_multiplies_float8_by_float8() -> None:
    device = torch.device("cuda")
    x, w = (draw(n, 256, device=device).to(torch.float8_e4m3fn) for n in (3, 96))
    x_scale, w_scale = torch.rand(3, device=device), torch.rand(96, device=device)
    got = small_gemm(x, w, x_scale_M=x_scale, w_scale_N=w_scale)
    expected = (x.float() @ w.float().T) * x_scale[:, None] * w_scale
    assert relative_error(got, expected) < 1e-2


def test_split_products_are_repeatable(device: torch.device) -> None:
    x, w = draw(3, 512, device=device), draw(64, 512, device=device)
    first, second = (small_gemm(x, w, tiling=Tiling(64, 64, 4)) for _ in range(2))
    assert torch.equal(first, second)


def test_more_rows_than_the_kernel_takes_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"1 to {MAX_ROWS} rows"):
        small_gemm(draw(MAX_ROWS + 1, 64, device=device), draw(8, 64, device=device))


def random_weight(kind: str, n: int, k: int, device: torch.device) -> tuple[PackedWeight, Tensor]:
    """Give a packed weight and its float32 values."""
    if kind.startswith("int4"):
        group = int(kind.removeprefix("int4-"))
        q = torch.randint(-8, 8, (n, k), device=device)
        scales = torch.rand(n, -(-k // group), device=device)
        return pack_int4(q, scales, group), q * scales.repeat_interleave(group, 1)[:, :k]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiling", [None, Tiling(64, 32, 2), Tiling(32, 32, 1, 2, narrow=True)])
def test_quantized_gemm_equals_product_with_dequantized_weight(
    device: torch.device, dtype: torch.dtype, kind: str, tiling: Tiling | None
) -> None:
    rng = random.Random(f"{kind}{tiling}")
    rows, n, k = rng.choice([1, 4, 16]), rng.choice([64, 70]), rng.choice([256, 576])
    weight, values = random_weight(kind, n, k, device)
    x, bias = draw(rows, k, device=device, dtype=dtype), draw(n, device=device, dtype=dtype)
    got = quantized_gemm(x, weight, bias_N=bias, tiling=tiling)
    assert relative_error(got, F.linear(x.float(), values, bias.float())) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4-32", "int4-64", "int4-128"])
@pytest.mark.parametrize(("n", "k", "ahead"), [(70, 256, True), (9, 1088, False)])
def test_quantized_gemv_equals_product_with_dequantized_weight(
    device: torch.device, dtype: torch.dtype, kind: str, n: int, k: int, ahead: bool
) -> None:
    weight, values = random_weight(kind, n, k, device)
    x, bias = draw(1, k, device=device, dtype=dtype), draw(n, device=device, dtype=dtype)
    got = quantized_gemv(x, weight, bias_N=bias, tiling=GemvTiling(8, 128, 1, ahead))
    assert relative_error(got, F.linear(x.float(), values, bias.float())) < 3 * tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("n", "k"), [(70, 256), (33, 576)])
def test_gemv_folds_norm_bias_gate_and_residual(
    device: torch.device, dtype: torch.dtype, ahead: bool, n: int, k: int
) -> None:
    tiling = GemvTiling(8, 128, 4, ahead)
    x, w, gain = (draw(*shape, device=device, dtype=dtype) for shape in ((1, k), (2 * n, k), (k,)))
    bias, residual = draw(2 * n, device=device, dtype=dtype), draw(1, n, device=device, dtype=dtype)
    plain = gemv(x, w, tiling=tiling)
    assert relative_error(plain, x.float() @ w.float().T) < tolerance(dtype)
    normed = F.rms_norm(x.float(), (k,), gain.float(), 1e-6)
    for gate in ("silu", "gelu_tanh"):
        expected = gated_activation(F.linear(normed, w.float(), bias.float()), gate == "silu") + residual.float()
        got = gemv(x, w, gain_K=gain, eps=1e-6, gate=gate, bias_N=bias, residual_1N=residual, tiling=tiling)
        assert relative_error(got, expected) < tolerance(dtype)
