"""Timing and parallel compilation for ``bench/kernels`` and ``bench/kernels/tune.py``."""

import importlib
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

READ_TBPS = 4.3
"""Measured read bandwidth of an H200, TB/s: what shares are shares of."""
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
"""Matrices [N, K] of Llama-3.1-8B."""
BF16 = torch.bfloat16

Launch = Callable[[], object]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the results. ``error`` is ||out - ref|| / ||ref||; ``other_us`` is torch's own way."""

    name: str
    us: float
    bytes: float = 0.0
    flops: float = 0.0
    error: float = float("nan")
    other_us: float = float("nan")

    def line(self) -> str:
        tbps = self.bytes / self.us * 1e-6
        tflops = self.flops / self.us * 1e-6
        return (
            f"{self.name:<58} {self.us:9.2f} us {tbps:6.2f} TB/s {tbps / READ_TBPS:6.1%} {tflops:7.1f} TFLOP/s"
            f"  err {self.error:.1e}  torch {self.other_us:9.2f} us"
        )


def relative_error(out: Tensor, reference: Tensor) -> float:
    out, reference = out.float(), reference.float()
    return float((out - reference).norm() / reference.norm())


def random_scales(n: int, k: int, group: int) -> Tensor:
    """Draw what a `PackedWeight` of n outputs and k inputs holds as scales; with ``group``, those of int4."""
    if not group:
        return torch.rand(n, 1, device="cuda")
    return torch.rand(n, 2 * k // group, device="cuda").to(torch.bfloat16).view(torch.int32)


def graph_us(launches: Sequence[Launch], replays: int = 7) -> float:
    """Capture the launches in a CUDA graph and give the median microseconds of one of them.

    Launches that read large inputs should rotate among several, together larger than the L2 cache.
    """
    launches[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def views(pool: Tensor, n: int, k: int, most: int = 8) -> list[Tensor]:
    """Cut matrices from the pool, to rotate among."""
    count = min(most, pool.numel() // (n * k))
    return [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(count)]


def rotate(weights: Sequence[Item], launch: Callable[[Item], Tensor], least: int = 12) -> list[Callable[[], Tensor]]:
    """Return at least ``least`` launches that take turns with the inputs."""
    count = len(weights)
    return [partial(launch, weights[i % count]) for i in range(max(least, count))]


def make_cache(rows: int, context: int, block_size: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and block tables of full rows over 8 KV heads, pages in random order."""
    pages = -(-context // block_size)
    k, v = (torch.randn((rows * pages + 1, block_size, 8, dim), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return k, v, torch.randperm(rows * pages, device="cuda").to(torch.int32).view(rows, pages)


def sdpa_row(rows: int, context: int, backend: str) -> Row:
    """Time torch's dense causal attention with one backend."""
    q, k, v = (torch.randn(rows, 32, context, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        us = graph_us([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)] * 2, 3)
    return Row(f"sdpa {backend} r{rows} c{context} d128", us, 0, 2.0 * context * context * 128 * 32 * rows)


KERNEL_MODULES = tuple(
    f"mgpu.worker.kernels.{name}"
    for name in (
        "layers.activation",
        "layers.arrange",
        "peers.all_reduce",
        "attention.decode",
        "attention.latent",
        "attention.latent_cache",
        "attention.latent_heads",
        "attention.latent_prefill",
        "products.dequantize",
        "peers.exchange",
        "experts.choose_in_groups",
        "layers.embed",
        "experts.few",
        "experts.few_packed",
        "experts.grouped",
        "experts.grouped_packed",
        "experts.grouped_scaled",
        "experts.route",
        "experts.route_and_sort",
        "experts.combine",
        "experts.sort",
        "layers.float8_codes",
        "layers.float8_quantize",
        "products.gemv",
        "products.dequantize_groups",
        "products.group_gemm",
        "products.group_gemv",
        "products.integer_gemv",
        "products.octet_gemv",
        "layers.gates",
        "layers.head_values",
        "layers.integer_rows",
        "layers.norm",
        "linear.convolve",
        "linear.project",
        "linear.scan",
        "linear.step",
        "attention.prefill",
        "products.dequantize_scaled",
        "products.quantized_gemm",
        "products.quantized_gemv",
        "attention.rope_cache",
        "sample",
        "peers.sent_product",
        "step_inputs",
        "peers.two_shot",
        "products.warpgroup.gemm",
        "products.warpgroup.float8_gemm",
        "products.warpgroup.rounded_gemm",
        "products.warpgroup.block_gemm",
        "products.warpgroup.integer_gemm",
        "products.warpgroup.octet_gemm",
    )
)


def set_overlap(enabled: bool) -> None:
    """Launch all kernels with or without programmatic dependent launch from now on."""

    def options(device: torch.device, num_warps: int, num_stages: int = 2) -> dict[str, int | bool]:
        plain: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages}
        return {**plain, "launch_pdl": True} if enabled else plain

    for name in KERNEL_MODULES:
        module = importlib.import_module(name)
        vars(module).update(overlaps_launches=lambda device: enabled, launch_options=options)


class _NoDevice:
    """Stands in for the CUDA driver, so that kernels compile without touching a device."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(capability: int = 90) -> None:
    """Turn every kernel launch of this process into a compilation, for Hopper unless ``capability`` says otherwise."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_NoDevice(capability))
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = warm_up
    torch.set_num_threads(1)


Job = tuple[Callable[..., object], tuple[Any, ...]]


def compile_job(job: Job, overlap: bool = True) -> str | None:
    """Call ``function(cpu, *arguments)``; return the error as text."""
    function, arguments = job
    set_overlap(overlap)
    try:
        function(torch.device("cpu"), *arguments)
    except Exception as error:  # a variant that does not compile is a result, not a failure
        return f"{function.__name__}{arguments}: {type(error).__name__}: {str(error)[-300:]}"
    return None


def compile_all(jobs: Sequence[Job], without_overlap: Sequence[Job] = ()) -> list[str]:
    """Fill Triton's cache from processes in which launches only compile; return the errors."""
    workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, get_context("spawn"), compile_only) as pool:
        pending = [pool.submit(compile_job, job, True) for job in jobs]
        pending += [pool.submit(compile_job, job, False) for job in without_overlap]
        return [error for future in pending if (error := future.result())]
