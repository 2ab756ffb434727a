# ruff: noqa: B023 - closures are called within the iteration that makes them
"""Time products of 4-bit weights by warpgroups, and of FP8 blocks; ``--sweep`` times every tiling.

    python -m bench.kernels.warpgroups [--rows 1,8,64,256] [--forms int4,GPTQ] [--sweep]

Needs a Hopper GPU. Weights have the shapes of Llama-3.1-8B. Each product is checked against plain torch before it is
timed; the medians are from a CUDA graph that rotates among weights larger than the L2 cache.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import BF16, SHAPES, compile_all, graph_us, random_scales, relative_error, rotate
from bench.options import numbers
from mgpu.launch.bench.report import describe, heading
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.products.choose import quantized_matmul
from mgpu.worker.kernels.products.dequantize import dequantize_packed
from mgpu.worker.kernels.products.float8_blocks import block_product
from mgpu.worker.kernels.products.warpgroup.gemm import WarpgroupTiling, choose_tiling, warpgroup_gemm
from mgpu.worker.kernels.runtime import Workspace
from mgpu.worker.quantization.packing import PackedWeight
from mgpu.worker.quantization.random_packed import random_packed

FORMS = {
    "GPTQ": WeightFormat("4", 128, scale_bytes=2, zero_bytes=1, source="GPTQ"),
    "FP8": WeightFormat("fp8", 128, 128, source="FP8"),
}
SPLITS = (1, 2, 3, 4)
T = WarpgroupTiling


def tilings(rows: int) -> list[WarpgroupTiling]:
    """Return the tilings to try: outputs, rows, splits, warps, stages, quarters."""
    block_m = choose_tiling(rows, 4096, 4096).block_m
    if rows <= 16:
        return [T(64, block_m, s, 4, n, 4) for s in SPLITS for n in (3, 4)]
    if rows <= 128:
        return [T(64, block_m, s, 4, n, q) for s in SPLITS for n, q in ((3, 2), (4, 2), (3, 4), (6, 1))]
    return [T(128, 256, s, 8, 5, 1) for s in SPLITS] + [T(64, 256, s, 4, 3, 1) for s in SPLITS]


@cache
def scratch() -> Workspace:
    return Workspace.create(torch.device("cuda"), 1 << 26)


def make_weight(form: str, n: int, k: int) -> PackedWeight:
    if form in FORMS:
        return random_packed(FORMS[form], (n,), k, torch.Generator("cuda").manual_seed(0))
    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), device="cuda", dtype=torch.int32)
    return PackedWeight("int4", words, random_scales(n, k, 32), k, 32)


def compile_tiling(device: torch.device, form: str, rows: int, tiling: WarpgroupTiling) -> None:
    words = torch.empty(4096, 512, dtype=torch.int32, device=device)
    weight = PackedWeight("int4", words, torch.empty(4096, 128, dtype=torch.int32, device=device), 4096, 32)
    if form in FORMS:
        weight = random_packed(FORMS[form], (4096,), 4096, torch.Generator(device))
    x = torch.empty(rows, 4096, dtype=BF16, device=device)
    warpgroup_gemm(x, weight, tiling=tiling, workspace=Workspace.create(device, 1 << 25))


def ways(
    form: str, rows: int, n: int, k: int, sweep: bool
) -> Iterator[tuple[str, Callable[[Tensor, PackedWeight], Tensor]]]:
    yield "chosen", quantized_matmul
    if form == "FP8":
        yield "in blocks", block_product
        return
    for tiling in tilings(rows) if sweep else [choose_tiling(rows, n, k)]:
        name = ",".join(map(str, astuple(tiling)))
        yield name, lambda x, w, t=tiling: warpgroup_gemm(x, w, tiling=t, workspace=scratch())


def measure(form: str, shape: str, rows: int, sweep: bool) -> str:
    n, k = SHAPES[shape]
    weights = [make_weight(form, n, k) for _ in range(4 if n > 8192 else 12)]
    x = torch.randn(rows, k, device="cuda").to(BF16)
    expected = x.float() @ dequantize_packed(weights[0], torch.float32).T
    dense = [dequantize_packed(weight, BF16) for weight in weights[:4]]
    found = [(graph_us(rotate(dense, lambda w: F.linear(x, w)), 3), "bf16", 0.0)]
    for name, multiply in ways(form, rows, n, k, sweep):
        try:
            error = relative_error(multiply(x, weights[0]), expected)
            found.append((graph_us(rotate(weights, lambda w: multiply(x, w)), 3), name, error))
        except Exception as failure:  # a tiling that does not fit is a result too
            found.append((float("inf"), f"{name}: {type(failure).__name__}", 0.0))
    return ", ".join(f"{us:.1f} us {name} ({error:.0e})" for us, name, error in sorted(found))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers, default=[1, 8, 16, 64, 128, 256])
    parser.add_argument("--forms", default="int4,GPTQ,FP8", help="int4 (of --quant 4), GPTQ, FP8 (blocks)")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    print(heading(describe("triton")), flush=True)
    forms = options.forms.split(",")
    if options.sweep:
        cases = itertools.product(set(forms) - {"FP8"}, options.rows)
        for problem in compile_all([(compile_tiling, (f, r, t)) for f, r in cases for t in tilings(r)]):
            print(problem)
    for form, shape, rows in itertools.product(forms, list(SHAPES)[:4], options.rows):
        print(f"{form} {shape}, {rows} rows: {measure(form, shape, rows, options.sweep)}", flush=True)


if __name__ == "__main__":
    main()
