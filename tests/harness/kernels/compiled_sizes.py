"""Print what kernels need on GPUs that have less than an H200: run by a test, without a GPU.

    python compiled_sizes.py 89 101376 sizes

One line of JSON for each launch: its kernel, its case and its bytes of shared memory, for GPUs of that capability on
which a program may have so many bytes. ``bench`` must be in PYTHONPATH.
"""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.kernels.timing import KERNEL_MODULES, compile_only, set_overlap
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.attention.decode import decode_attention
from mgpu.worker.kernels.attention.inputs import LatentProjections, LatentRows, NewLatents, PagedCache
from mgpu.worker.kernels.attention.latent import latent_attention
from mgpu.worker.kernels.attention.latent_cache import store_latents
from mgpu.worker.kernels.attention.latent_heads import absorb, values
from mgpu.worker.kernels.attention.latent_prefill import ContextPiece, PromptRows, latent_prefill
from mgpu.worker.kernels.attention.prefill import prefill_attention
from mgpu.worker.kernels.experts.choose import ExpertStacks, RouterWeights, sparse_mlp
from mgpu.worker.kernels.experts.route_and_sort import Choice, route_and_sort
from mgpu.worker.kernels.layers.float8_codes import quantize_spans
from mgpu.worker.kernels.layers.float8_quantize import quantize_blocks, quantize_rows
from mgpu.worker.kernels.layers.integer_rows import integer_rows
from mgpu.worker.kernels.products.choose import quantized_matmul
from mgpu.worker.kernels.products.dequantize import dequantize_packed
from mgpu.worker.kernels.products.quantized_gemm import quantized_gemm
from mgpu.worker.kernels.products.quantized_gemv import quantized_gemv
from mgpu.worker.kernels.products.warpgroup.float8_trial import span_of
from mgpu.worker.kernels.runtime import Workspace
from mgpu.worker.quantization.packing import PackedWeight, WeightKind
from mgpu.worker.quantization.random_packed import random_packed
from mgpu.worker.quantization.stacks import empty_stack

BF16 = torch.bfloat16
CPU = torch.device("cpu")
HEADS, GROUP = 8, 32


def pretend(capability: int, shared: int) -> None:
    """Compile for GPUs of this capability, with tiles for so much shared memory."""
    compile_only(capability)
    set_overlap(capability >= 90)
    told = {"shared_bytes": lambda device: shared, "has_float8": lambda device: capability >= 89}
    for module in map(importlib.import_module, (*KERNEL_MODULES, "mgpu.worker.kernels.runtime")):
        vars(module).update({name: value for name, value in told.items() if name in vars(module)})


def attend(name: str, dim: int, block_size: int, dtype: torch.dtype) -> None:
    cache = torch.zeros(4, block_size, HEADS, dim, dtype=dtype)
    tables, lens = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    q = torch.zeros(2, 4 * HEADS, dim, dtype=dtype)
    if name == "decode":
        decode_attention(q, PagedCache(cache, cache, tables, lens), scale=1.0)
    else:
        starts = torch.arange(3, dtype=torch.int32)
        prefill_attention(q, PagedCache(cache, cache, tables, lens), starts, scale=1.0)


def attend_latents(rank: int, dtype: torch.dtype) -> None:
    cache, q = torch.zeros(4, 64, rank + 64, dtype=dtype), torch.zeros(2, 128, rank, dtype=dtype)
    new = NewLatents(cache[0, :2], torch.zeros(2, 128, 64, dtype=dtype), torch.zeros(rank, dtype=dtype), 1e-6, True)
    places = torch.zeros(2, dtype=torch.int64)
    wide = LatentProjections(torch.zeros(2, 128, 128, dtype=dtype), torch.zeros(128, 256, rank, dtype=dtype))
    rotated, _ = store_latents(new, torch.zeros(4, 64), places, places, cache, wide)
    rows = LatentRows(torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    latent_attention(q, rotated, cache, rows, scale=1.0, out_THC=torch.zeros_like(q))
    weight, out = torch.zeros(128, 256, rank, dtype=dtype), torch.zeros(2, 128, 128, dtype=dtype)
    piece = ContextPiece(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3], dtype=torch.int32), 0)
    prompts = PromptRows(rows.lens[:1], torch.tensor([0, 2], dtype=torch.int32), (piece, piece))
    heads = LatentProjections(values(absorb(torch.zeros_like(out), weight), weight, 128), weight)
    latent_prefill(heads, rotated, cache, prompts, scale=1.0, out_THV=out)


def multiply(kind: WeightKind, rows: int, n: int, dtype: torch.dtype) -> None:
    k, per_word = 1024, 8 if kind == "int4" else 4
    scales = torch.zeros(n, k // GROUP, dtype=torch.int32) if kind == "int4" else torch.zeros(n, 1)
    weight = PackedWeight(kind, torch.zeros(n, k // per_word, dtype=torch.int32), scales, k, GROUP * (kind == "int4"))
    product: Callable[[Tensor, PackedWeight], Tensor] = quantized_gemv if rows == 1 else quantized_gemm
    product(torch.zeros(rows, k, dtype=dtype), weight)


def multiply_words(form: WeightFormat, rows: int, outputs: int) -> None:
    from mgpu.worker.kernels.products.warpgroup.gemm import warpgroup_gemm

    weight = random_packed(form, (outputs,), 1024, torch.Generator().manual_seed(0))
    if not form.source:
        scales = torch.zeros(outputs, 1024 // GROUP, dtype=torch.int32)
        weight = PackedWeight("int4", weight.words, scales, 1024, GROUP)
    warpgroup_gemm(torch.zeros(rows, 1024, dtype=BF16), weight, workspace=Workspace.create(CPU))


def multiply_float8_words(form: WeightFormat, rows: int) -> None:
    from mgpu.worker.kernels.products.warpgroup.float8_gemm import float8_words_gemm

    weight = random_packed(form, (128,), 1024, torch.Generator().manual_seed(0))
    x = quantize_spans(torch.zeros(rows, 1024, dtype=BF16), 1024, span_of(weight))
    float8_words_gemm(x, weight, workspace=Workspace.create(CPU))


def multiply_rounded(form: WeightFormat, rows: int, outputs: int) -> None:
    from mgpu.worker.kernels.products.warpgroup.rounded_gemm import rounded_gemm

    weight = random_packed(form, (outputs,), 1024, torch.Generator().manual_seed(0))
    weight = replace(weight, power=torch.ones(1))
    rounded_gemm(quantize_rows(torch.zeros(rows, 1024, dtype=BF16)), weight, workspace=Workspace.create(CPU))


def multiply_octets(form: WeightFormat, rows: int) -> None:
    from mgpu.worker.kernels.products.warpgroup.octet_gemm import octet_gemm

    weight = random_packed(form, (128,), 1024, torch.Generator().manual_seed(0))
    octet_gemm(torch.zeros(rows, 1024, dtype=BF16), weight, workspace=Workspace.create(CPU))


def multiply_blocks(rows: int) -> None:
    from mgpu.worker.kernels.products.warpgroup.block_gemm import block_gemm

    form = WeightFormat("fp8", 128, 128, 4, source="blocks")
    weight = random_packed(form, (128,), 1024, torch.Generator().manual_seed(0))
    x = quantize_blocks(torch.zeros(rows, 1024, dtype=BF16))
    block_gemm(x, rows, weight, workspace=Workspace.create(CPU))


def multiply_integers(rows: int, splits: int) -> None:
    from mgpu.worker.kernels.products.warpgroup.integer_gemm import integer_gemm

    weight = random_packed(WeightFormat("8"), (128,), 1024, torch.Generator().manual_seed(0))
    x = integer_rows(torch.zeros(rows, 1024, dtype=BF16))
    integer_gemm(x, weight, splits=splits, workspace=Workspace.create(CPU))


def dequantize(form: WeightFormat) -> None:
    dequantize_packed(random_packed(form, (64, 64), 256, torch.Generator().manual_seed(0)), BF16)


def multiply_groups(form: WeightFormat, rows: int, outputs: int = 1024) -> None:
    weight = random_packed(form, (outputs,), 1024, torch.Generator().manual_seed(0))
    quantized_matmul(torch.zeros(rows, 1024, dtype=BF16), weight)


def multiply_experts(form: WeightFormat, rows: int = 128) -> None:
    generator, count = torch.Generator().manual_seed(0), 2
    stacks = []
    for parts, inputs in (((256, 256), 256), ((256,), 256)):
        stacks.append(empty_stack(random_packed(form, parts, inputs, generator), count))
    router = RouterWeights(torch.zeros(count, 256, dtype=BF16), 1, True)
    sparse_mlp(torch.zeros(rows, 256, dtype=BF16), router, ExpertStacks(stacks[0], stacks[1], 0, "silu"))


def multiply_dense_experts(tokens: int) -> None:
    gate_up, down = torch.zeros(1, 512, 256, dtype=BF16), torch.zeros(1, 256, 256, dtype=BF16)
    router = RouterWeights(torch.zeros(1, 256, dtype=BF16), 1, True)
    sparse_mlp(torch.zeros(tokens, 256, dtype=BF16), router, ExpertStacks(gate_up, down, 0, "silu"))


def route(tokens: int, count: int, dtype: torch.dtype) -> None:
    x, w = torch.zeros(tokens, 1024, dtype=dtype), torch.zeros(count, 1024, dtype=dtype)
    route_and_sort(x, w, Choice(8, True, None, 0, count), 16)


Case = tuple[Callable[..., None], tuple[Any, ...]]
SIZES: tuple[Case, ...] = (
    (attend, ("decode", 128, 64, BF16)),
    (attend, ("prefill", 256, 64, BF16)),
    (attend, ("prefill", 512, 64, BF16)),
    *((attend, (name, 512, 64, torch.float32)) for name in ("decode", "prefill")),
    (attend_latents, (512, BF16)),
    (attend_latents, (512, torch.float32)),
    (multiply, ("int8", 64, 1024, BF16)),
    (multiply, ("int4", 64, 28672, BF16)),
    (dequantize, (WeightFormat("4", 128, 1, 2, 1, True, "act-order"),)),
    (dequantize, (WeightFormat("4", 128, 1, 2, 1, False, "groups"),)),
    (multiply_groups, (WeightFormat("4", 128, 1, 2, 1, False, "groups"), 1)),
    (multiply_groups, (WeightFormat("4", 128, 1, 2, 1, False, "groups"), 64)),
    *((multiply_groups, (GGUF_FORMATS[kind], rows)) for kind in ("Q4_K", "Q6_K") for rows in (1, 16)),
    (multiply_groups, (WeightFormat("8", 32, 1, 2, source="groups"), 64)),
    (multiply_groups, (GGUF_FORMATS["IQ4_NL"], 64)),
    *((multiply_experts, (GGUF_FORMATS[kind],)) for kind in ("Q6_K", "IQ4_XS")),
    (multiply_dense_experts, (128,)),
    (route, (8, 256, torch.float32)),
    (route, (600, 512, BF16)),
)
"""The largest tiles of each kernel."""
FLOAT8: tuple[Case, ...] = (
    (multiply, ("fp8", 1, 1024, BF16)),
    (multiply, ("fp8", 2, 1024, torch.float16)),
    (dequantize, (WeightFormat("fp8", 128, 128, 2, source="blocks"),)),
    *((multiply_groups, (WeightFormat("fp8", 128, 128, 4, source="blocks"), rows)) for rows in (1, 16)),
    (multiply_experts, (WeightFormat("fp8", 128, 128, 4, source="blocks"), 2)),
    (multiply_groups, (WeightFormat("4", 128, 1, 2, 1, False, "groups"), 1, 4128)),
    (multiply_groups, (GGUF_FORMATS["Q6_K"], 1, 4128)),
)
"""What needs no instruction that converts float8, and products by dot products of bytes."""
WARPGROUPS: tuple[Case, ...] = (
    (multiply_words, (WeightFormat("4", 32), 1, 128)),
    (multiply_words, (WeightFormat("4", 128, 1, 2, 1, False, "groups"), 64, 128)),
    (multiply_float8_words, (WeightFormat("4", 64, 1, 2, 1, False, "groups"), 300)),
    *((multiply_words, (GGUF_FORMATS[name], 8, 128)) for name in ("Q6_K", "Q2_K", "IQ4_XS")),
    *((multiply_rounded, (GGUF_FORMATS[name], 65, 128)) for name in ("Q6_K", "Q2_K", "MXFP4")),
    (multiply_rounded, (GGUF_FORMATS["Q6_K"], 300, 8192)),
    (multiply_integers, (300, 2)),
    (multiply_blocks, (64,)),
    (multiply_octets, (GGUF_FORMATS["Q8_0"], 300)),
    (multiply_octets, (WeightFormat("8", 128, 1, 2, 1, source="groups"), 128)),
)


def main() -> None:
    pretend(int(sys.argv[1]), int(sys.argv[2]))
    run = JITFunction.run
    case = ""

    def report(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options)
        print(json.dumps({"kernel": self.__name__, "case": case, "shared": kernel.metadata.shared}))
        return kernel

    JITFunction.run = report
    for function, arguments in {"sizes": SIZES, "float8": FLOAT8, "warpgroups": WARPGROUPS}[sys.argv[3]]:
        case = str(arguments)
        function(*arguments)


if __name__ == "__main__":
    main()
