# ruff: noqa: B023 - closures are called within the iteration that makes them
"""Time every kernel with its own choice of tiling: achieved bandwidth or arithmetic, error, and torch's alternative.

Needs a Hopper GPU: ``PYTHONPATH=src python -m bench.kernels [OUT_FILE] [--only float8_products,layers]``. Inputs are
random, launches rotate among buffers larger than the L2 cache and are replayed from a CUDA graph; times are medians.
Shapes are Llama-3.1-8B's.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.decode_chain import DecodeChain
from bench.kernels.latent import latent_attentions
from bench.kernels.quantized import (
    float8_layers,
    float8_products,
    grouped_products,
    many_rows,
    mlps,
    quantized_products,
)
from bench.kernels.timing import BF16, SHAPES, Row, graph_us, make_cache, relative_error, rotate, sdpa_row, views
from mgpu.worker.kernels import reference
from mgpu.worker.kernels.attention.decode import decode_attention
from mgpu.worker.kernels.attention.inputs import PackedHeads, PagedCache
from mgpu.worker.kernels.attention.prefill import PrefillTiling, prefill_attention
from mgpu.worker.kernels.attention.rope_cache import rope_and_cache
from mgpu.worker.kernels.layers.activation import gated_activation
from mgpu.worker.kernels.layers.norm import add_rms_norm
from mgpu.worker.kernels.products.choose import matmul, one_row_matmul
from mgpu.worker.kernels.sample import sample
from mgpu.worker.kernels.step_inputs import DecodeInputs, prepare_decode

FP8_PREFILL = (
    None,
    PrefillTiling(64, 64, 4, 3),
    PrefillTiling(64, 64, 4, 2, bulk=False),
    PrefillTiling(128, 64, 8, 2),
    PrefillTiling(128, 64, 8, 3),
)


def random_pool(count: int) -> Tensor:
    return torch.randn(count, device="cuda", dtype=torch.float32).mul_(0.02).to(BF16)


def products() -> Iterator[Row]:
    pool = random_pool(6 * 10**8)
    for name, (n, k) in SHAPES.items():
        weights = views(pool, n, k)
        for rows in (1, 2, 8):
            x = torch.randn(rows, k, device="cuda").to(BF16)
            other = graph_us(rotate(weights, lambda w: F.linear(x, w)))
            error = relative_error(matmul(x, weights[0]), x.float() @ weights[0].float().T)
            us = graph_us(rotate(weights, lambda w: matmul(x, w))) if rows == 1 else other
            yield Row(f"matmul {name} m{rows}", us, 2.0 * n * k, error=error, other_us=other)
        if name == "gate_up":
            x = torch.randn(1, k, device="cuda").to(BF16)
            us = graph_us(rotate(weights, lambda w: one_row_matmul(x, w, None, "silu")))
            other = graph_us(rotate(weights, lambda w: gated_activation(matmul(x, w), "silu")))
            yield Row("gated matmul gate_up m1, and in two kernels", us, 2.0 * n * k, other_us=other)


def decode_attentions() -> Iterator[Row]:
    for (rows, context), block_size, dtype in itertools.product(
        ((1, 128), (1, 1024), (1, 8192), (8, 1024), (64, 1024), (256, 1024)), (16, 64), (BF16, torch.float8_e4m3fn)
    ):
        sets = max(1, min(8, (256 << 20) // (rows * context * 4096)))
        caches = [make_cache(rows, context, block_size, 128) for _ in range(sets)]
        caches = [(k.to(dtype), v.to(dtype), tables) for k, v, tables in caches]
        q = torch.randn(rows, 32, 128, device="cuda").to(BF16)
        lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        few = min(rows, 4)
        k, v, tables = caches[0]
        expected = reference.paged_attention(
            q[:few], k.float(), v.float(), tables, [context] * few, list(range(few + 1)), 128**-0.5
        )
        error = relative_error(decode_attention(q, PagedCache(*caches[0], lens), scale=128**-0.5)[:few], expected)
        us = graph_us(rotate(caches, lambda cache: decode_attention(q, PagedCache(*cache, lens), scale=128**-0.5), 4))
        moved = rows * context * 2.0 * 8 * 128 * k.element_size()
        yield Row(f"decode r{rows} c{context} bs{block_size} {str(dtype)[6:]}", us, moved, error=error)


def prefill_attentions() -> Iterator[Row]:
    for (rows, context), (block_size, dim) in itertools.product(
        ((1, 8192), (32, 1024)), ((16, 128), (64, 128), (64, 64), (64, 256))
    ):
        k, v, tables = make_cache(rows, context, block_size, dim)
        q = torch.randn(rows * context, 32, dim, device="cuda").to(BF16)
        lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * context
        cache = PagedCache(k, v, tables, lens)
        us = graph_us([lambda: prefill_attention(q, cache, starts, scale=dim**-0.5)] * 2, 3)
        short = min(context, 1024)
        first = PagedCache(k, v, tables[:1], lens[:1].clamp(max=short))
        got = prefill_attention(q[:short], first, starts[:2].clamp(max=short), scale=dim**-0.5)
        expected = reference.paged_attention(q[:short], k, v, tables[:1], [short], [0, short], dim**-0.5)
        other = sdpa_row(rows, context, "CUDNN_ATTENTION").us if dim == 128 else float("nan")
        flops = 2.0 * context * context * dim * 32 * rows
        name = f"prefill r{rows} c{context} bs{block_size} d{dim}"
        yield Row(name, us, flops=flops, error=relative_error(got, expected), other_us=other)


def fp8_prefill_attentions() -> Iterator[Row]:
    """Heads of 128 over a float8 cache with pages of 64: the choice (None) and what else compiles without spilling."""
    for (rows, context), tiling in itertools.product(((1, 8192), (32, 1024)), FP8_PREFILL):
        k, v, tables = make_cache(rows, context, 64, 128)
        k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
        q = torch.randn(rows * context, 32, 128, device="cuda").to(BF16)
        lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * context
        cache = PagedCache(k, v, tables, lens)
        out = prefill_attention(q, cache, starts, scale=128**-0.5, tiling=tiling)
        expected = reference.paged_attention(q[:1024], k, v, tables[:1], [1024], [0, 1024], 128**-0.5)
        us = graph_us([lambda: prefill_attention(q, cache, starts, scale=128**-0.5, tiling=tiling)] * 2, 3)
        flops = 2.0 * context * context * 128 * 32 * rows
        shape = tiling and (tiling.block_m, tiling.block_n, tiling.num_warps, tiling.num_stages)
        error = relative_error(out[:1024], expected)
        yield Row(f"prefill fp8 r{rows} c{context} {shape}", us, flops=flops, error=error)


def layers() -> Iterator[Row]:
    weight = torch.rand(4096, device="cuda").to(BF16)
    for tokens in (1, 64, 8192):
        x, residual = (torch.randn(tokens, 4096, device="cuda").to(BF16) for _ in range(2))
        us = graph_us([lambda: add_rms_norm(residual, x, weight, 1e-5)] * 20)
        expected = reference.rms_norm(residual + x, weight, 1e-5)
        error = relative_error(add_rms_norm(residual.clone(), x, weight, 1e-5), expected)
        other = graph_us([lambda: F.rms_norm(residual.add_(x), (4096,), weight, 1e-5)] * 20)
        yield Row(f"add_rms_norm t{tokens}", us, tokens * 4096 * 8.0, error=error, other_us=other)

        wide = torch.randn(tokens, 28672, device="cuda").to(BF16)
        us = graph_us([lambda: gated_activation(wide, "silu")] * 20)
        error = relative_error(gated_activation(wide, "silu"), reference.gated_activation(wide, True))
        other = graph_us([lambda: F.silu(wide[:, :14336]).mul_(wide[:, 14336:])] * 20)
        yield Row(f"gated_activation t{tokens}", us, tokens * 14336 * 6.0, error=error, other_us=other)

        k, v, _ = make_cache(1, max(tokens, 1024), 16, 128)
        qkv = torch.randn(tokens, 48, 128, device="cuda").to(BF16)
        cos_sin = torch.rand(max(tokens, 1024), 128, device="cuda")
        places = torch.arange(tokens, device="cuda")
        heads = PackedHeads(qkv, cos_sin)
        us = graph_us([lambda: rope_and_cache(heads, places, places, k, v)] * 20)
        expected = reference.rotate(qkv[:, :32], cos_sin[places])
        error = relative_error(rope_and_cache(heads, places, places, k, v), expected)
        yield Row(f"rope_and_cache t{tokens}", us, tokens * 48 * 128 * 4.0, error=error)
        k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
        us = graph_us([lambda: rope_and_cache(heads, places, places, k, v)] * 20)
        yield Row(f"rope_and_cache fp8 t{tokens}", us, tokens * (48 * 2 + 32 * 2 + 16) * 128.0)


def sampling() -> Iterator[Row]:
    for rows in (1, 64, 256):
        logits = torch.randn(rows, 128256, device="cuda")
        index = torch.arange(rows, device="cuda")
        temperatures = torch.ones(rows, device="cuda")
        seeds = torch.randint(-(2**31), 2**31 - 1, (rows, 2), dtype=torch.int32, device="cuda")
        moved, other = logits.numel() * 4.0, graph_us([lambda: logits.argmax(-1)] * 10)
        wrong = float((sample(logits)[1].long() != logits.argmax(-1)).sum())
        yield Row(f"sample greedy s{rows}", graph_us([lambda: sample(logits)] * 10), moved, error=wrong, other_us=other)
        options = {"rows_S": index, "positions_S": index, "temperatures": temperatures, "seeds": seeds}
        yield Row(f"sample drawn s{rows}", graph_us([lambda: sample(logits, **options)] * 10), moved)
        inputs = DecodeInputs.create(rows, 512, torch.device("cuda"))
        tokens, blocks = (torch.zeros(rows, n, dtype=torch.int32, device="cuda") for n in (8192, 512))
        count = torch.tensor([rows], device="cuda")
        us = graph_us([lambda: prepare_decode(index, index, count, tokens, blocks, 16, inputs)] * 10)
        yield Row(f"prepare_decode r{rows}", us)


def steps() -> Iterator[Row]:
    """Whole decode steps of Llama-3.1-8B at 128 tokens of context; torch: cuBLAS for the products."""
    chain = DecodeChain(torch.device("cuda"), rows=64, context=128, layers=32)
    for rows in (1, 8, 16, 64):
        other = graph_us([lambda: chain.step(rows)], 9)
        us = graph_us([lambda: chain.step(rows, {})], 9) if rows == 1 else other
        yield Row(f"step r{rows}", us, chain.weight_bytes, other_us=other)


PARTS = {
    part.__name__: part
    for part in (
        products,
        quantized_products,
        grouped_products,
        float8_products,
        float8_layers,
        mlps,
        many_rows,
        decode_attentions,
        prefill_attentions,
        fp8_prefill_attentions,
        latent_attentions,
        layers,
        sampling,
        steps,
    )
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_file", type=Path, nargs="?")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    options = parser.parse_args()
    lines = []
    for name in options.only.split(","):
        for row in PARTS[name]():
            lines.append(row.line())
            print(lines[-1], flush=True)
    if options.out_file:
        options.out_file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
