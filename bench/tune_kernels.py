# ruff: noqa: B023 - closures are called within the iteration that makes them
"""Time tilings of the kernels: where the choice tables in ``worker/kernels`` come from.

Needs a Hopper GPU: ``PYTHONPATH=src python bench/tune_kernels.py OUT_DIRECTORY``.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decode_chain import DecodeChain, chain_jobs
from kernel_timing import Row, compile_all, graph_us, relative_error, set_overlap
from torch import Tensor

from mgpu.worker.kernels.decode_attention import DecodeTiling, decode_attention
from mgpu.worker.kernels.packing import PackedWeight, dequantize
from mgpu.worker.kernels.prefill_attention import PrefillTiling, prefill_attention
from mgpu.worker.kernels.quantized_gemm import quantized_gemm
from mgpu.worker.kernels.reference import paged_attention
from mgpu.worker.kernels.runtime import Workspace, default_workspace
from mgpu.worker.kernels.small_gemm import Tiling, small_gemm

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BF16 = torch.bfloat16


def gemm_tilings() -> list[Tiling]:
    tilings = []
    for (bn, bk, stages), bulk, splits in itertools.product(
        [(64, 64, 4), (64, 64, 8), (64, 128, 3), (64, 128, 4), (64, 128, 6), (64, 256, 3), (128, 64, 4), (128, 128, 3)],
        (False, True),
        (1, 2, 4, 8),
    ):
        tilings.append(Tiling(bn, bk, splits, 4, stages, True, bulk))
    tilings += [Tiling(64, 128, splits, 4, 4, False) for splits in (1, 2, 4, 8)]
    tilings += [Tiling(32, 128, splits, 4, stages) for splits in (1, 2, 4) for stages in (4, 8)]
    tilings += [Tiling(128, 128, splits, 8, 3) for splits in (1, 2, 4)]
    return tilings


def quantized_tilings() -> list[Tiling]:
    return [
        Tiling(bn, 32, splits, 4, stages, prefetch)
        for bn, stages, splits, prefetch in itertools.product((64, 128), (3, 5, 8), (1, 2, 4, 8), (True,))
    ] + [Tiling(64, 32, splits, 4, 5, False) for splits in (1, 4)]


def workspace(device: torch.device) -> Workspace:
    return Workspace.create(device) if device.type == "cpu" else default_workspace(device)


def run_gemm(device: torch.device, tiling: Tiling, rows: int = 4) -> None:
    x, w = torch.empty(rows, 4096, dtype=BF16, device=device), torch.empty(4096, 4096, dtype=BF16, device=device)
    small_gemm(x, w, tiling=tiling, workspace=workspace(device))


def empty_packed(kind: str, n: int, k: int, group: int, device: torch.device) -> PackedWeight:
    words = torch.empty(n, k // (8 if kind == "int4" else 4), dtype=torch.int32, device=device)
    return PackedWeight(kind, words, torch.empty(k // group if group else 1, n, device=device), k, group)  # type: ignore[arg-type]


def run_quantized(device: torch.device, kind: str, group: int, tiling: Tiling) -> None:
    x = torch.empty(4, 4096, dtype=BF16, device=device)
    quantized_gemm(x, empty_packed(kind, 4096, 4096, group, device), tiling=tiling, workspace=workspace(device))


def run_gemm_fp8(device: torch.device, tiling: Tiling) -> None:
    x, w = (torch.empty(n, 4096, dtype=torch.float8_e4m3fn, device=device) for n in (4, 4096))
    x_scale, w_scale = (torch.empty(n, device=device) for n in (4, 4096))
    small_gemm(x, w, x_scale_M=x_scale, w_scale_N=w_scale, tiling=tiling, workspace=workspace(device))


def wide_tilings() -> list[Tiling]:
    """For 17 to 64 rows."""
    sizes = ((64, 64, 4), (64, 128, 3), (64, 128, 4), (128, 64, 4), (128, 128, 3))
    return [Tiling(bn, bk, splits, 4, stages) for (bn, bk, stages), splits in itertools.product(sizes, (1, 2, 4))]


def fp8_tilings() -> list[Tiling]:
    sizes = ((64, 128, 4), (64, 256, 4), (128, 128, 4))
    return [Tiling(bn, bk, splits, 4, stages) for (bn, bk, stages), splits in itertools.product(sizes, (1, 2, 4))]


def run_decode(device: torch.device, block_size: int, dim: int, dtype: torch.dtype, tiling: DecodeTiling) -> None:
    cache = torch.empty(16, block_size, 8, dim, dtype=dtype, device=device)
    q = torch.empty(4, 32, dim, dtype=BF16, device=device)
    tables = torch.empty(4, 64, dtype=torch.int32, device=device)
    lens = torch.empty(4, dtype=torch.int32, device=device)
    decode_attention(q, cache, cache, tables, lens, scale=0.1, tiling=tiling, workspace=workspace(device))


def run_prefill(device: torch.device, block_size: int, dim: int, tiling: PrefillTiling) -> None:
    cache = torch.empty(16, block_size, 8, dim, dtype=BF16, device=device)
    q = torch.empty(256, 32, dim, dtype=BF16, device=device)
    tables = torch.empty(4, 64, dtype=torch.int32, device=device)
    lens, starts = (torch.empty(n, dtype=torch.int32, device=device) for n in (4, 5))
    prefill_attention(q, cache, cache, tables, lens, starts, scale=0.1, tiling=tiling)


def decode_tilings() -> list[tuple[int, DecodeTiling]]:
    plain = itertools.product((16, 64), (32, 64, 128), (3, 5, 7), (4,))
    wide = [*itertools.product((16, 64), (128,), (3, 5), (8,)), *itertools.product((16, 64), (32, 64), (3, 5), (2,))]
    return [(bs, DecodeTiling(1, bn, 128, warps, stages)) for bs, bn, stages, warps in (*plain, *wide)]


def prefill_tilings() -> list[tuple[int, int, PrefillTiling]]:
    tilings = [(16, 128, PrefillTiling(128, bn, 8, stages, False)) for bn, stages in ((64, 3), (64, 5), (128, 3))]
    for bulk in (False, True):
        tilings += [(64, 128, PrefillTiling(128, 64, 8, stages, bulk)) for stages in (2, 3, 4)]
        tilings += [(64, 128, PrefillTiling(64, 64, 4, stages, bulk)) for stages in (2, 3)]
        tilings += [(128, 128, PrefillTiling(128, 128, 8, stages, bulk)) for stages in (2, 3)]
        tilings += [(64, 64, PrefillTiling(128, 64, 8, 3, bulk)), (128, 64, PrefillTiling(128, 128, 8, 3, bulk))]
        tilings += [(64, 256, PrefillTiling(128, 64, 8, 2, bulk)), (64, 256, PrefillTiling(64, 64, 4, 2, bulk))]
    tilings += [(16, 64, PrefillTiling(128, 64, 4, 3, False)), (16, 256, PrefillTiling(64, 32, 4, 3, False))]
    return tilings


def time_gemms(results: list[Row]) -> None:
    pool = torch.randn(3 * 10**8, device="cuda", dtype=torch.float32).mul_(0.02).to(BF16)
    for name, (n, k) in SHAPES.items():
        count = min(8, pool.numel() // (n * k))
        weights = [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(count)]
        launches = max(16, count)
        for rows in (1, 16):
            x = torch.randn(rows, k, device="cuda", dtype=BF16)
            reference = x.float() @ weights[0].float().T
            cublas = graph_us([lambda w=weights[i % count]: F.linear(x, w) for i in range(launches)])  # type: ignore[misc]
            for tiling in gemm_tilings() if rows == 1 else gemm_tilings()[::3]:
                error = relative_error(small_gemm(x, weights[0], tiling=tiling), reference)
                us = graph_us(
                    [lambda w=weights[i % count]: small_gemm(x, w, tiling=tiling) for i in range(launches)]  # type: ignore[misc]
                )
                results.append(
                    Row(f"gemm {name} m{rows} {short(tiling)}", us, 2.0 * n * k, 2.0 * rows * n * k, error, cublas)
                )


def time_wide_gemms(results: list[Row]) -> None:
    pool = torch.randn(3 * 10**8, device="cuda", dtype=torch.float32).mul_(0.02).to(BF16)
    for (name, (n, k)), rows in itertools.product(SHAPES.items(), (32, 64)):
        count = min(8, pool.numel() // (n * k))
        weights = [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(count)]
        x = torch.randn(rows, k, device="cuda", dtype=BF16)
        reference = x.float() @ weights[0].float().T
        cublas = graph_us([lambda w=w: F.linear(x, w) for w in weights * 2])  # type: ignore[misc]
        for tiling in wide_tilings():
            error = relative_error(small_gemm(x, weights[0], tiling=tiling), reference)
            us = graph_us([lambda w=w: small_gemm(x, w, tiling=tiling) for w in weights * 2])  # type: ignore[misc]
            results.append(
                Row(f"gemm {name} m{rows} {short(tiling)}", us, 2.0 * n * k, 2.0 * rows * n * k, error, cublas)
            )


def time_fp8_gemms(results: list[Row]) -> None:
    pool = torch.randn(6 * 10**8, device="cuda", dtype=BF16).to(torch.float8_e4m3fn)
    for name, (n, k) in SHAPES.items():
        count = min(12, pool.numel() // (n * k))
        weights = [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(count)]
        x = torch.randn(4, k, device="cuda", dtype=BF16).to(torch.float8_e4m3fn)
        one, ones = torch.rand(4, device="cuda"), torch.rand(n, device="cuda")
        reference = (x.float() @ weights[0].float().T) * one[:, None] * ones
        for tiling in fp8_tilings():

            def launch(w: Tensor) -> Tensor:
                return small_gemm(x, w, x_scale_M=one, w_scale_N=ones, tiling=tiling)

            error = relative_error(launch(weights[0]), reference)
            us = graph_us([lambda w=w: launch(w) for w in weights * 2])  # type: ignore[misc]
            results.append(Row(f"fp8 {name} m4 {short(tiling)}", us, 1.0 * n * k, 2.0 * 4 * n * k, error))


def short(tiling: Any) -> str:
    return ",".join(f"{getattr(tiling, name)}" for name in tiling.__slots__)


def time_quantized(results: list[Row]) -> None:
    pool = torch.randint(-(2**31), 2**31 - 1, (15 * 10**7,), device="cuda", dtype=torch.int32)
    for kind, group in (("int8", 0), ("int4", 128)):
        for name, (n, k) in SHAPES.items():
            size = n * k // (8 if kind == "int4" else 4)
            count = min(16, pool.numel() // size)
            scales = torch.rand(k // group if group else 1, n, device="cuda")
            weights = [
                PackedWeight(kind, pool[i * size : (i + 1) * size].view(n, -1), scales, k, group)  # type: ignore[arg-type]
                for i in range(count)
            ]
            x = torch.randn(1, k, device="cuda", dtype=BF16)
            reference = x.float() @ dequantize(weights[0], torch.float32).T
            for tiling in quantized_tilings():
                error = relative_error(quantized_gemm(x, weights[0], tiling=tiling), reference)
                us = graph_us(
                    [lambda w=weights[i % count]: quantized_gemm(x, w, tiling=tiling) for i in range(max(16, count))]  # type: ignore[misc]
                )
                results.append(Row(f"{kind} {name} m1 {short(tiling)}", us, 4.0 * size, 2.0 * n * k, error))


def make_cache(
    rows: int, context: int, block_size: int, dim: int, heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    pages = -(-context // block_size)
    shape = (rows * pages + 1, 8, block_size, dim) if heads_first else (rows * pages + 1, block_size, 8, dim)
    k, v = (torch.randn(shape, device="cuda", dtype=BF16) for _ in range(2))
    if heads_first:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    tables = torch.randperm(rows * pages, device="cuda").to(torch.int32).view(rows, pages)
    return k, v, tables


def time_decode(results: list[Row]) -> None:
    for rows, context, all_splits in (
        (1, 128, (1, 4)),
        (1, 1024, (4, 8, 16, 32)),
        (1, 8192, (16, 32, 64)),
        (8, 1024, (2, 4, 8)),
        (64, 1024, (1, 2, 4)),
        (256, 1024, (1, 2)),
    ):
        sets = max(1, min(8, (256 << 20) // (rows * context * 4096)))
        for block_size in (16, 64, -64):
            caches = [make_cache(rows, context, abs(block_size), 128, block_size < 0) for _ in range(sets)]
            q = torch.randn(rows, 32, 128, device="cuda", dtype=BF16)
            lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
            few = min(rows, 4)
            reference = paged_attention(
                q[:few], *caches[0][:2], caches[0][2], [context] * few, list(range(few + 1)), 128**-0.5
            )
            for splits, (bs, base) in itertools.product(all_splits, decode_tilings()):
                if bs != abs(block_size) or (block_size < 0 and (base.block_n, base.num_warps) != (64, 4)):
                    continue
                tiling = DecodeTiling(splits, base.block_n, 128, base.num_warps, base.num_stages)

                def launch(i: int, tiling: DecodeTiling = tiling) -> Tensor:
                    k, v, tables = caches[i % sets]
                    return decode_attention(q, k, v, tables, lens, scale=128**-0.5, tiling=tiling)

                error = relative_error(launch(0)[:few], reference)
                us = graph_us([lambda i=i: launch(i) for i in range(max(4, sets))], 5)  # type: ignore[misc]
                name = f"decode r{rows} c{context} bs{block_size} {short(tiling)}"
                results.append(Row(name, us, rows * context * 4096.0, 0, error))
    time_decode_fp8(results)


def fp8_decode_tilings() -> list[tuple[int, DecodeTiling]]:
    return [(bs, DecodeTiling(1, bn, 128, 4, n)) for bs, bn, n in itertools.product((16, 64), (64, 128), (3, 5))]


def time_decode_fp8(results: list[Row]) -> None:
    rows, context = 64, 1024
    for bs, tiling in fp8_decode_tilings():
        k, v, tables = make_cache(rows, context, bs, 128)
        k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
        q = torch.randn(rows, 32, 128, device="cuda", dtype=BF16)
        lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)

        def launch() -> Tensor:
            return decode_attention(q, k, v, tables, lens, scale=128**-0.5, tiling=tiling)

        reference = paged_attention(q[:4], k.float(), v.float(), tables, [context] * 4, [0, 1, 2, 3, 4], 128**-0.5)
        error = relative_error(launch()[:4], reference)
        us = graph_us([launch] * 4)
        results.append(
            Row(f"decode fp8 r{rows} c{context} bs{bs} {short(tiling)}", us, rows * context * 2048.0, 0, error)
        )


def time_prefill(results: list[Row]) -> None:
    for rows, context in ((1, 8192), (32, 1024)):
        for block_size, dim, tiling in prefill_tilings():
            k, v, tables = make_cache(rows, context, block_size, dim)
            q = torch.randn(rows * context, 32, dim, device="cuda", dtype=BF16)
            lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
            starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * context

            def launch(tiling: PrefillTiling = tiling) -> Tensor:
                return prefill_attention(q, k, v, tables, lens, starts, scale=dim**-0.5, tiling=tiling)

            dense_k, dense_v = (
                x[tables[0].long()].flatten(0, 1)[:context].transpose(0, 1).repeat_interleave(4, 0)[None]
                for x in (k, v)
            )
            q_row = q[:context].transpose(0, 1)[None]
            reference = F.scaled_dot_product_attention(q_row, dense_k, dense_v, is_causal=True)[0].transpose(0, 1)
            error = relative_error(launch()[:context], reference)
            us = graph_us([launch, launch], 3)
            flops = 2.0 * context * context * dim * 32 * rows
            results.append(
                Row(f"prefill r{rows} c{context} bs{block_size} d{dim} {short(tiling)}", us, 0, flops, error)
            )
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            results.append(sdpa_row(rows, context, backend))


def sdpa_row(rows: int, context: int, backend: str) -> Row:
    q, k, v = (torch.randn(rows, 32, context, 128, device="cuda", dtype=BF16) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        us = graph_us([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)] * 2, 3)
    return Row(f"sdpa {backend} r{rows} c{context} d128", us, 0, 2.0 * context * context * 128 * 32 * rows)


def time_chain(results: list[Row]) -> None:
    chain = DecodeChain(torch.device("cuda"), rows=16, context=128, layers=32)
    set_overlap(False)
    expected = chain.step(8, False).tolist()
    for rows, overlap, prefetch, library in itertools.product((1, 8), (True, False), (True, False), (False, True)):
        if (not overlap or library) and prefetch:
            continue
        set_overlap(overlap)
        chosen: list[Tensor] = []
        us = graph_us([lambda: chosen.append(chain.step(rows, prefetch, library))], 9)
        same = chosen[-1].tolist() == expected[:rows]
        name = f"8B step r{rows} overlap={overlap} prefetch={prefetch} cublas={library} same={same}"
        results.append(Row(name, us, chain.weight_bytes))
    set_overlap(True)


def overlap_works() -> bool:
    """Tell whether launches that overlap can be captured here at all."""
    try:
        run_gemm(torch.device("cuda"), Tiling(64, 128, 1))
        graph_us([lambda: run_gemm(torch.device("cuda"), Tiling(64, 128, 1))] * 2)
    except RuntimeError as error:
        print(f"no overlap: {error}", flush=True)
        return False
    return True


def main() -> None:
    out = Path(sys.argv[1])
    begin = time.monotonic()
    jobs: list[Any] = [*chain_jobs(), *((run_prefill, tiling) for tiling in prefill_tilings())]
    jobs += [(run_decode, (bs, 128, BF16, tiling)) for bs, tiling in decode_tilings()]
    jobs += [(run_decode, (bs, 128, torch.float8_e4m3fn, tiling)) for bs, tiling in fp8_decode_tilings()]
    jobs += [(run_gemm, (tiling, rows)) for tiling in wide_tilings() for rows in (32, 64)]
    jobs += [(run_gemm_fp8, (tiling,)) for tiling in fp8_tilings()]
    jobs += [(run_gemm, (tiling,)) for tiling in gemm_tilings()]
    jobs += [
        (run_quantized, (*kind, tiling)) for kind in (("int8", 0), ("int4", 128)) for tiling in quantized_tilings()
    ]
    errors = compile_all(jobs, chain_jobs())
    print(f"compiled {len(jobs)} variants, {len(errors)} failed, {time.monotonic() - begin:.1f} s", flush=True)
    set_overlap(overlap_works())
    results: list[Row] = []
    for part in (time_chain, time_gemms, time_wide_gemms, time_fp8_gemms, time_quantized, time_decode, time_prefill):
        part_begin = time.monotonic()
        try:
            part(results)
        except Exception as error:  # keep what the other parts measured
            errors.append(f"{part.__name__}: {type(error).__name__}: {error}")
        print(f"{part.__name__}: {time.monotonic() - part_begin:.1f} s, {len(results)} rows", flush=True)
        (out / "tune.txt").write_text("\n".join([*errors, *(row.line() for row in results)]) + "\n")
    (out / "tune.json").write_text(json.dumps([[row.name, row.us, row.error, row.other_us] for row in results]))


if __name__ == "__main__":
    main()
