# ruff: noqa: B023 - closures are called within the iteration that makes them
"""Time tilings of the kernels: where the choice tables in ``worker/kernels`` come from.

Needs a Hopper GPU: ``PYTHONPATH=src python -m bench.kernels.tune OUT_DIRECTORY``. All variants are compiled first, in
parallel; each is checked against its reference before it is timed.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.decode_chain import SHAPES as CHAIN_SHAPES
from bench.kernels.decode_chain import DecodeChain, chain_jobs
from bench.kernels.timing import (
    Row,
    compile_all,
    graph_us,
    make_cache,
    random_scales,
    relative_error,
    rotate,
    sdpa_row,
    set_overlap,
    views,
)
from mgpu.worker.kernels.attention.decode import DecodeTiling, decode_attention
from mgpu.worker.kernels.attention.inputs import PagedCache
from mgpu.worker.kernels.attention.prefill import PrefillTiling, prefill_attention
from mgpu.worker.kernels.products.gemv import GemvTiling, gemv
from mgpu.worker.kernels.products.quantized_gemm import Tiling, quantized_gemm
from mgpu.worker.kernels.products.quantized_gemv import QuantizedGemvTiling, quantized_gemv
from mgpu.worker.kernels.reference import gated_activation, paged_attention
from mgpu.worker.kernels.runtime import Workspace, default_workspace
from mgpu.worker.quantization.packing import PackedWeight, dequantize

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BF16 = torch.bfloat16


def short(tiling: Any) -> str:
    values = (getattr(tiling, field.name) for field in dataclasses.fields(tiling))
    return ",".join(str(int(value) if isinstance(value, bool) else value) for value in values)


class Results:
    """Rows and errors so far, written after every part, so that a cut-off run keeps them."""

    def __init__(self, out: Path) -> None:
        self.out, self.rows, self.errors = out, list[Row](), list[str]()

    def measure(self, name: str, launches: list[Callable[[], Tensor]], expected: Tensor, **facts: float) -> None:
        """Check the first launch, then time all of them."""
        try:
            got = launches[0]()
            error = relative_error(got[: expected.shape[0]], expected)
            self.rows.append(Row(name, graph_us(launches, 5), error=error, **facts))
        except Exception as failure:  # a variant that does not fit is a result too
            self.errors.append(f"{name}: {type(failure).__name__}: {str(failure)[:200]}")

    def best(self, prefix: str) -> str | None:
        """Return the tiling with the least time among rows called ``prefix`` + tiling."""
        rows = [row for row in self.rows if row.name.startswith(prefix) and row.error < 0.01]
        return min(rows, key=lambda row: row.us).name.removeprefix(prefix) if rows else None

    def save(self) -> None:
        (self.out / "tune.txt").write_text("\n".join([*self.errors, *(row.line() for row in self.rows)]) + "\n")
        (self.out / "tune.json").write_text(json.dumps([[r.name, r.us, r.error, r.other_us] for r in self.rows]))


# ------------------------------------------------------------------------------------------------ variants


def quantized_tilings() -> list[Tiling]:
    shapes = [(64, 4, 3), (64, 4, 5), (64, 4, 8), (128, 4, 4), (128, 8, 4)]
    return [Tiling(block_n, splits, *rest) for block_n, *rest in shapes for splits in (1, 2, 4, 8)]


def gemv_tilings() -> list[GemvTiling]:
    shapes = [(4, 256, 1), (8, 256, 1), (2, 512, 1), (4, 512, 1), (2, 1024, 1), (4, 512, 2), (8, 512, 2), (2, 1024, 2)]
    shapes += [(4, 1024, 2), (4, 1024, 4), (8, 1024, 4), (2, 2048, 4), (4, 2048, 4), (4, 2048, 8), (8, 2048, 8)]
    return [GemvTiling(*shape) for shape in shapes]


def quantized_gemv_tilings() -> list[QuantizedGemvTiling]:
    """A step is 4 words per thread, so that the activations have the weights' layout."""
    cuts = itertools.product((2, 4, 8, 16), (1, 2, 4), (False, True))
    return [QuantizedGemvTiling(rows, 128 * warps, warps, ahead) for rows, warps, ahead in cuts]


def decode_tilings() -> list[tuple[int, DecodeTiling]]:
    shapes = [(64, 2, 3), (64, 2, 5), (64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 4, 5), (32, 2, 5), (128, 8, 3)]
    return [(bs, DecodeTiling(1, bn, 128, warps, n)) for bs in (16, 32, 64) for bn, warps, n in shapes]


def prefill_tilings() -> list[tuple[int, int, PrefillTiling]]:
    tilings = [(16, 128, PrefillTiling(128, 128, 8, 3)), (16, 128, PrefillTiling(64, 64, 4, 3))]
    tilings += [(16, 128, PrefillTiling(64, 64, 4, 5)), (32, 128, PrefillTiling(64, 64, 4, 3))]
    for dim, registers in ((128, None), (128, 128), (64, None), (64, 128)):
        for m, n, warps, stages in ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)):
            tilings.append((64, dim, PrefillTiling(m, n, warps, stages, max_registers=registers)))
    tilings.append((64, 128, PrefillTiling(64, 32, 4, 3)))
    tilings.append((64, 128, PrefillTiling(64, 64, 4, 2, max_registers=168)))
    tilings += [(128, 128, PrefillTiling(64, 128, 4, 2)), (128, 128, PrefillTiling(128, 128, 8, 2))]
    tilings += [(128, 128, PrefillTiling(64, 128, 4, 1)), (128, 128, PrefillTiling(128, 128, 8, 3))]
    tilings += [(64, 64, PrefillTiling(128, 64, 4, 2)), (64, 256, PrefillTiling(128, 64, 8, 2))]
    tilings += [(64, 256, PrefillTiling(128, 32, 8, 2)), (64, 256, PrefillTiling(128, 32, 8, 3))]
    return tilings


# ------------------------------------------------------------------------------------------------ compilation


def workspace(device: torch.device) -> Workspace:
    return Workspace.create(device) if device.type == "cpu" else default_workspace(device)


def run_gemv(device: torch.device, tiling: GemvTiling) -> None:
    x, w = torch.empty(1, 4096, dtype=BF16, device=device), torch.empty(4096, 4096, dtype=BF16, device=device)
    gemv(x, w, tiling=tiling)
    gemv(x, w, gate="silu", tiling=tiling)


def run_quantized(device: torch.device, kind: str, group: int, tiling: Tiling, rows: int = 4) -> None:
    words = torch.empty(4096, 4096 // (8 if kind == "int4" else 4), dtype=torch.int32, device=device)
    scales = torch.empty(4096, 4096 // group if group else 1, dtype=torch.int32 if group else None, device=device)
    weight = PackedWeight(kind, words, scales, 4096, group)  # type: ignore[arg-type]
    x = torch.empty(rows, 4096, dtype=BF16, device=device)
    quantized_gemm(x, weight, tiling=tiling, workspace=workspace(device))


def run_quantized_gemv(device: torch.device, kind: str, group: int, tiling: QuantizedGemvTiling) -> None:
    words = torch.empty(4096, 4096 // (8 if kind == "int4" else 4), dtype=torch.int32, device=device)
    scales = torch.empty(4096, 4096 // group if group else 1, dtype=torch.int32 if group else None, device=device)
    weight = PackedWeight(kind, words, scales, 4096, group)  # type: ignore[arg-type]
    quantized_gemv(torch.empty(1, 4096, dtype=BF16, device=device), weight, tiling=tiling)


def run_decode(device: torch.device, block_size: int, dim: int, dtype: torch.dtype, tiling: DecodeTiling) -> None:
    cache = torch.empty(16, block_size, 8, dim, dtype=dtype, device=device)
    q = torch.empty(4, 32, dim, dtype=BF16, device=device)
    tables, lens = (torch.empty(shape, dtype=torch.int32, device=device) for shape in ((4, 64), (4,)))
    rows = PagedCache(cache, cache, tables, lens)
    decode_attention(q, rows, scale=0.1, tiling=tiling, workspace=workspace(device))


def run_prefill(device: torch.device, block_size: int, dim: int, tiling: PrefillTiling) -> None:
    cache = torch.empty(16, block_size, 8, dim, dtype=BF16, device=device)
    q = torch.empty(256, 32, dim, dtype=BF16, device=device)
    tables = torch.empty(4, 64, dtype=torch.int32, device=device)
    lens, starts = (torch.empty(n, dtype=torch.int32, device=device) for n in (4, 5))
    prefill_attention(q, PagedCache(cache, cache, tables, lens), starts, scale=0.1, tiling=tiling)


WIDE = [Tiling(64, splits, 4, stages) for splits in (1, 2, 4) for stages in (3, 5)]
FP8_DECODE = [
    DecodeTiling(1, bn, 128, w, n) for bn, w, n in ((64, 4, 3), (64, 4, 5), (128, 4, 3), (128, 4, 5), (64, 2, 5))
]
KINDS = (("int8", 0), ("int4", 32))


def all_jobs() -> Iterator[Any]:
    yield from chain_jobs()
    yield from ((run_prefill, variant) for variant in prefill_tilings())
    yield from ((run_decode, (bs, 128, BF16, tiling)) for bs, tiling in decode_tilings())
    yield from ((run_decode, (bs, 128, torch.float8_e4m3fn, t)) for bs in (16, 64) for t in FP8_DECODE)
    yield from ((run_gemv, (tiling,)) for tiling in gemv_tilings())
    yield from ((run_quantized, (*kind, tiling)) for kind in KINDS for tiling in quantized_tilings())
    yield from ((run_quantized, (*kind, tiling, rows)) for kind in KINDS for tiling in WIDE for rows in (32, 64))
    yield from ((run_quantized_gemv, (*kind, tiling)) for kind in KINDS for tiling in quantized_gemv_tilings())


# ------------------------------------------------------------------------------------------------ timing


def time_products(results: Results) -> None:
    pool = torch.randn(3 * 10**8, device="cuda", dtype=torch.float32).mul_(0.02).to(BF16)
    for name, (n, k) in SHAPES.items():
        weights = views(pool, n, k)
        x = torch.randn(1, k, device="cuda", dtype=BF16)
        expected = x.float() @ weights[0].float().T
        facts = {
            "bytes": 2.0 * n * k,
            "flops": 2.0 * n * k,
            "other_us": graph_us(rotate(weights, lambda w: F.linear(x, w))),
        }
        for tiling in gemv_tilings():
            launches = rotate(weights, lambda w: gemv(x, w, tiling=tiling))
            results.measure(f"gemv {name} m1 {short(tiling)}", launches, expected, **facts)
            if name == "gate_up":
                launches = rotate(weights, lambda w: gemv(x, w, gate="silu", tiling=tiling))
                results.measure(f"gemv-gated m1 {short(tiling)}", launches, gated_activation(expected, True), **facts)


def time_quantized(results: Results) -> None:
    pool = torch.randint(-(2**31), 2**31 - 1, (15 * 10**7,), device="cuda", dtype=torch.int32)
    for (kind, group), (name, (n, k)) in itertools.product(KINDS, SHAPES.items()):
        per_word = 8 if kind == "int4" else 4
        scales = random_scales(n, k, group)
        weights = [
            PackedWeight(kind, words, scales, k, group)  # type: ignore[arg-type]
            for words in views(pool, n, k // per_word, 16)
        ]
        dense = dequantize(weights[0], torch.float32)
        for rows in (1, 16, 32, 64):
            x = torch.randn(rows, k, device="cuda", dtype=BF16)
            expected = x.float() @ dense.T
            facts = {"bytes": 4.0 * weights[0].words.numel(), "flops": 2.0 * rows * n * k}
            for tiling in WIDE if rows > 16 else quantized_tilings():
                launches = rotate(weights, lambda w: quantized_gemm(x, w, tiling=tiling))
                results.measure(f"{kind} {name} m{rows} {short(tiling)}", launches, expected, **facts)
            for gemv_tiling in quantized_gemv_tilings() if rows == 1 else ():
                launches = rotate(weights, lambda w: quantized_gemv(x, w, tiling=gemv_tiling))
                results.measure(f"{kind}-gemv {name} m1 {short(gemv_tiling)}", launches, expected, **facts)


def time_decode(results: Results) -> None:
    cases = ((1, 128, (1,)), (1, 1024, (8,)), (1, 8192, (16, 32)), (8, 1024, (2, 4, 8)))
    cases += ((64, 128, (1,)), (64, 1024, (1, 2)), (256, 1024, (1,)))  # type: ignore[assignment]
    for (rows, context, all_splits), block_size in itertools.product(cases, (16, 32, 64)):
        sets = max(1, min(8, (256 << 20) // (rows * context * 4096)))
        caches = [make_cache(rows, context, block_size, 128) for _ in range(sets)]
        q = torch.randn(rows, 32, 128, device="cuda", dtype=BF16)
        lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        few = min(rows, 4)
        expected = paged_attention(q[:few], *caches[0], [context] * few, list(range(few + 1)), 128**-0.5)
        for splits, (bs, base) in itertools.product(all_splits, decode_tilings()):
            for stretch in (128, 256) if rows <= 8 else (128,):
                if bs != block_size:
                    continue
                tiling = dataclasses.replace(base, splits=splits, stretch=stretch)
                launches = rotate(
                    caches, lambda c: decode_attention(q, PagedCache(*c, lens), scale=128**-0.5, tiling=tiling), 4
                )
                name = f"decode r{rows} c{context} bs{bs} {short(tiling)}"
                results.measure(name, launches, expected, bytes=rows * context * 4096.0)
    time_decode_fp8(results)


def time_decode_fp8(results: Results) -> None:
    for rows, block_size in itertools.product((64, 256), (16, 64)):
        k, v, tables = make_cache(rows, 1024, block_size, 128)
        k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
        q = torch.randn(rows, 32, 128, device="cuda", dtype=BF16)
        lens = torch.full((rows,), 1024, device="cuda", dtype=torch.int32)
        expected = paged_attention(q[:4], k.float(), v.float(), tables, [1024] * 4, [0, 1, 2, 3, 4], 128**-0.5)
        for tiling in FP8_DECODE:
            launches = [lambda: decode_attention(q, PagedCache(k, v, tables, lens), scale=128**-0.5, tiling=tiling)] * 4
            name = f"decode fp8 r{rows} c1024 bs{block_size} {short(tiling)}"
            results.measure(name, launches, expected, bytes=rows * 1024 * 2048.0)


def time_prefill(results: Results) -> None:
    for rows, context in ((1, 8192), (32, 1024)):
        for block_size, dim, tiling in prefill_tilings():
            k, v, tables = make_cache(rows, context, block_size, dim)
            q = torch.randn(rows * context, 32, dim, device="cuda", dtype=BF16)
            lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
            starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * context
            dense = (x[tables[0].long()].flatten(0, 1)[:context].transpose(0, 1) for x in (k, v))
            dense_k, dense_v = (x.repeat_interleave(4, 0)[None] for x in dense)
            q_row = q[:context].transpose(0, 1)[None]
            expected = F.scaled_dot_product_attention(q_row, dense_k, dense_v, is_causal=True)[0].transpose(0, 1)
            cache = PagedCache(k, v, tables, lens)
            launches = [lambda: prefill_attention(q, cache, starts, scale=dim**-0.5, tiling=tiling)] * 2
            flops = 2.0 * context * context * dim * 32 * rows
            results.measure(
                f"prefill r{rows} c{context} bs{block_size} d{dim} {short(tiling)}", launches, expected, flops=flops
            )
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            results.rows.append(sdpa_row(rows, context, backend))


def parse(text: str | None) -> GemvTiling | None:
    """Turn `short`'s text back into a tiling."""
    return GemvTiling(*map(int, text.split(","))) if text else None


def time_chain(results: Results) -> None:
    """Time whole decode steps: cuBLAS, then for one row the best kernel of each shape, with and without overlap."""
    chain = DecodeChain(torch.device("cuda"), rows=16, context=128, layers=32)
    names = dict(zip(CHAIN_SHAPES, SHAPES, strict=True))
    set_overlap(True)
    expected = chain.step(16).tolist()
    for rows, overlap in itertools.product((1, 8, 16), (True, False)):
        set_overlap(overlap)
        steps: dict[str, Callable[[], Tensor]] = {"cublas": lambda: chain.step(rows)}
        if rows == 1:
            best = {shape: parse(results.best(f"gemv {name} m1 ")) for shape, name in names.items()}
            steps["gemv"] = lambda: chain.step(1, best)
        for name, step in steps.items():
            chosen: list[Tensor] = []
            try:
                us = graph_us([lambda: chosen.append(step())], 9)
            except Exception as failure:
                results.errors.append(f"chain {name}: {failure}")
                continue
            same = sum(a == b for a, b in zip(chosen[-1].tolist(), expected, strict=False))
            results.rows.append(Row(f"8B step r{rows} overlap={overlap} {name} same={same}", us, chain.weight_bytes))
    set_overlap(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for tune.txt and tune.json")
    results = Results(parser.parse_args().folder)
    begin = time.monotonic()
    jobs = list(all_jobs())
    results.errors += compile_all(jobs, chain_jobs())
    print(f"compiled {len(jobs)} variants, {len(results.errors)} failed, {time.monotonic() - begin:.1f} s", flush=True)
    set_overlap(True)
    for part in (time_products, time_chain, time_quantized, time_decode, time_prefill):
        part_begin = time.monotonic()
        try:
            part(results)
        except Exception as error:  # keep what the other parts measure
            results.errors.append(f"{part.__name__}: {type(error).__name__}: {error}")
        results.save()
        print(f"{part.__name__}: {time.monotonic() - part_begin:.1f} s, {len(results.rows)} rows", flush=True)


if __name__ == "__main__":
    main()
