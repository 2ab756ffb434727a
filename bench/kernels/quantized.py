# ruff: noqa: B023 - closures are called within the iteration that makes them
"""Parts of ``bench/kernels``: products with quantized weights, and what surrounds them in a layer."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import BF16, SHAPES, Row, compile_all, graph_us, random_scales, relative_error, rotate, views
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.quantization import WeightFormat, weight_format
from mgpu.worker.kernels.layers.activation import gated_activation, gated_activation_float8
from mgpu.worker.kernels.layers.float8_quantize import quantize_rows
from mgpu.worker.kernels.layers.norm import add_rms_norm, add_rms_norm_float8
from mgpu.worker.kernels.products.choose import quantized_matmul
from mgpu.worker.kernels.products.dequantize import dequantize_packed
from mgpu.worker.kernels.products.float8_product import float8_product
from mgpu.worker.kernels.products.quantized_gemm import Tiling, quantized_gemm
from mgpu.worker.kernels.runtime import Workspace
from mgpu.worker.layers.activations import values_and_scale
from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.mlp import GatedMLP
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.quantization.packing import PackedWeight, WeightKind, dequantize
from mgpu.worker.quantization.random_packed import random_packed
from mgpu.worker.ranks.collectives import SingleRank

QUANTIZED: tuple[tuple[WeightKind, int], ...] = (("int8", 0), ("fp8", 0), ("int4", 32), ("int4", 128))
"""Kinds and groups. Groups of 32 are what `--quant 4` makes."""
GROUPED = {
    "GPTQ g128": WeightFormat("4", 128, scale_bytes=2, zero_bytes=1, source="GPTQ"),
    "FP8 128x128": WeightFormat("fp8", 128, 128, source="FP8"),
    "MXFP4": WeightFormat("fp4", 32, scale_bytes=1, source="MXFP4"),
    **{kind: GGUF_FORMATS[kind] for kind in ("Q4_K", "Q6_K", "Q8_0", "Q4_1")},
}
MANY_ROWS = [
    Tiling(block_n, splits, warps, stages, most_rows)
    for block_n, warps, stages, most_rows in (
        (64, 4, 3, 64),
        (64, 4, 2, 128),
        (64, 4, 3, 128),
        (128, 8, 2, 128),
        (128, 8, 2, 256),
    )
    for splits in (1, 2)
]


def random_words() -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (15 * 10**7,), device="cuda", dtype=torch.int32)


def random_weights(pool: Tensor, kind: WeightKind, group: int, n: int, k: int) -> list[PackedWeight]:
    scales = random_scales(n, k, group)
    return [PackedWeight(kind, words, scales, k, group) for words in views(pool, n, k // (8 if group else 4), 16)]


def compile_many(device: torch.device, kind: WeightKind, group: int, tiling: Tiling, rows: int) -> None:
    words = torch.empty(4096, 4096 // (8 if group else 4), dtype=torch.int32, device=device)
    scales = torch.empty(4096, 4096 // group if group else 1, dtype=torch.int32 if group else None, device=device)
    x = torch.empty(rows, 4096, dtype=BF16, device=device)
    weight = PackedWeight(kind, words, scales, 4096, group)
    quantized_gemm(x, weight, tiling=tiling, workspace=Workspace.create(device))


def many_rows() -> Iterator[Row]:
    """`quantized_gemm` for more rows than it is used for; torch: dequantize, then the library's product."""
    kinds = (QUANTIZED[0], QUANTIZED[2])
    jobs = [(compile_many, (*kind, tiling, rows)) for kind in kinds for tiling in MANY_ROWS for rows in (128, 256)]
    for problem in compile_all(jobs):
        print(problem)
    pool = random_words()
    for (kind, group), (name, (n, k)) in itertools.product(kinds, list(SHAPES.items())[:4]):
        weights = random_weights(pool, kind, group, n, k)
        dense = dequantize_packed(weights[0], BF16)
        for rows in (128, 256):
            x = torch.randn(rows, k, device="cuda").to(BF16)
            other = graph_us(rotate(weights, lambda w: F.linear(x, dequantize_packed(w, BF16))))
            for tiling in MANY_ROWS:
                cut = f"{tiling.block_n},{tiling.splits},{tiling.num_warps},{tiling.num_stages},{tiling.most_rows}"
                try:
                    error = relative_error(quantized_gemm(x, weights[0], tiling=tiling), F.linear(x, dense))
                    us = graph_us(rotate(weights, lambda w: quantized_gemm(x, w, tiling=tiling)), 3)
                except Exception as failure:  # tiles that need too much shared memory are a result too
                    print(f"{kind} {name} {cut}: {type(failure).__name__}: {str(failure)[:80]}")
                    continue
                title = f"many {kind} {name} m{rows} {cut}"
                yield Row(title, us, 4.0 * weights[0].words.numel(), 2.0 * rows * n * k, error, other)


def quantized_products() -> Iterator[Row]:
    pool = random_words()
    for (kind, group), (name, (n, k)) in itertools.product(QUANTIZED, SHAPES.items()):
        # A random byte may be float8's NaN (0x7F), so clear a bit of each.
        weights = random_weights(pool & 0x3F3F3F3F if kind == "fp8" else pool, kind, group, n, k)
        parts = [weight.words for weight in weights]
        dense = dequantize_packed(weights[0], torch.float32)
        for rows in (1, 2, 8, 16, 64):
            x = torch.randn(rows, k, device="cuda").to(BF16)
            error = relative_error(quantized_matmul(x, weights[0]), x.float() @ dense.T)
            us = graph_us(rotate(weights, lambda w: quantized_matmul(x, w)))
            yield Row(f"quantized {kind} g{group} {name} m{rows}", us, 4.0 * parts[0].numel(), error=error)
        if name == "gate_up":
            us = graph_us(rotate(weights, lambda w: dequantize_packed(w, BF16)))
            error = relative_error(dense, dequantize(weights[0], torch.float32))
            yield Row(f"dequantize {kind} g{group} {name}", us, 4.0 * parts[0].numel() + 2.0 * n * k, error=error)


def grouped_products() -> Iterator[Row]:
    """Weights whose groups have scales of their own, as files have them; torch: bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)
    for name, (n, k) in list(SHAPES.items())[1:4]:
        dense = [torch.randn(n, k, device="cuda").to(BF16) for _ in range(3)]
        rows = {count: torch.randn(count, k, device="cuda").to(BF16) for count in (1, 8, 64, 128, 256, 512)}
        others = {count: graph_us(rotate(dense, lambda w: F.linear(x, w)), 3) for count, x in rows.items()}
        del dense
        for title, form in GROUPED.items():
            weights = [random_packed(form, (n,), k, generator) for _ in range(4 if n > 8192 else 12)]
            full = dequantize_packed(weights[0], torch.float32)
            us = graph_us(rotate(weights, lambda w: dequantize_packed(w, BF16)), 3)
            yield Row(f"dequantize {title} {name}", us, weights[0].nbytes + 2.0 * n * k)
            for count, x in rows.items():
                error = relative_error(quantized_matmul(x, weights[0]), x.float() @ full.T)
                us = graph_us(rotate(weights, lambda w: quantized_matmul(x, w)), 3)
                yield Row(
                    f"grouped {title} {name} m{count}", us, weights[0].nbytes, error=error, other_us=others[count]
                )


def float8_products() -> Iterator[Row]:
    """W8A8: the product alone, with its rows quantized and rescaled apart, and weight-only; torch: bfloat16."""
    pool = random_words() & 0x3F3F3F3F
    for (name, (n, k)), rows in itertools.product(list(SHAPES.items())[:4], (8, 16, 64, 128, 256, 2048)):
        scales = torch.full((n, 1), 2.0**-8, device="cuda")
        weights = [PackedWeight("fp8", words, scales, k, 0) for words in views(pool, n, k // 4, 16)]
        dense = [dequantize_packed(weight, BF16) for weight in weights[:4]]
        x = torch.randn(rows, k, device="cuda").to(BF16)
        eights, expected = quantize_rows(x), x.float() @ dense[0].float().T
        other = graph_us(rotate(dense, lambda w: F.linear(x, w)))
        ways = {
            "float8 alone": lambda w: float8_product(eights, w).values,
            "float8 apart": lambda w: float8_product(quantize_rows(x), w).scaled(),
            "weight-only": lambda w: quantized_matmul(x, w),
        }
        for way, multiply in ways.items():
            error = float("nan") if way == "float8 alone" else relative_error(multiply(weights[0]), expected)
            us = graph_us(rotate(weights, multiply))
            yield Row(f"{way} {name} m{rows}", us, 1.0 * n * k, 2.0 * rows * n * k, error, other)


def mlps() -> Iterator[Row]:
    """Norm, gate and up, activation, down, as layers call them; torch: the same with dense weights."""
    chains = [half_layers(weight_format(quant)) for quant in ("fp8", "none")]
    for rows in (16, 64, 128, 256, 2048):
        x, residual = (torch.randn(rows, 4096, device="cuda").to(BF16) for _ in range(2))
        us, other = (graph_us(rotate(chain, lambda half: run_half(*half, residual, x))) for chain in chains)
        yield Row(f"norm and MLP fp8 m{rows}", us, 3.0 * 14336 * 4096, 6.0 * rows * 14336 * 4096, other_us=other)


def run_half(norm: RMSNorm, mlp: GatedMLP, residual: Tensor, x: Tensor) -> Tensor:
    return values_and_scale(mlp(norm.add_and_norm(residual, x)))[0]


def half_layers(form: WeightFormat) -> list[tuple[RMSNorm, GatedMLP]]:
    device, halves = torch.device("cuda"), []
    for seed in range(3):
        mlp = GatedMLP(4096, 14336, "silu", False, SingleRank(), Storage(BF16, device, form))
        norm = RMSNorm(4096, 1e-5, BF16, device)
        norm.takes_float8 = mlp.gate_up.takes_float8
        for linear in (mlp.gate_up, mlp.down):
            linear.init_dummy(torch.Generator(device).manual_seed(seed))
        halves.append((norm, mlp))
    return halves


def float8_layers() -> Iterator[Row]:
    """What quantizes within other kernels; torch: our kernels that do not."""
    weight = torch.rand(4096, device="cuda").to(BF16)
    for tokens in (16, 64, 256, 2048):
        x, residual = (torch.randn(tokens, 4096, device="cuda").to(BF16) for _ in range(2))
        wide, scale = torch.randn(tokens, 28672, device="cuda").to(BF16), torch.rand(tokens, device="cuda")
        us = graph_us([lambda: add_rms_norm_float8(residual, x, weight, 1e-5, scale)] * 20)
        other = graph_us([lambda: add_rms_norm(residual, x, weight, 1e-5)] * 20)
        yield Row(f"add_rms_norm_float8 t{tokens}", us, tokens * 4096 * 7.0, other_us=other)
        us = graph_us([lambda: gated_activation_float8(wide, "silu", scale)] * 20)
        other = graph_us([lambda: gated_activation(wide, "silu")] * 20)
        yield Row(f"gated_activation_float8 t{tokens}", us, tokens * 14336 * 5.0, other_us=other)
        us = graph_us([lambda: quantize_rows(x)] * 20)
        yield Row(f"quantize_rows t{tokens}", us, tokens * 4096 * 3.0)
