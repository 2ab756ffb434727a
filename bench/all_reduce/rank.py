"""One rank of `all_reduce.py`: ``python all_reduce_rank.py BACKEND,… SIZE RANK FD FOLDER DEVICE BYTES,…``.

Rank 0 prints JSON: by backend a list of message bytes, microseconds per call, and per call inside a CUDA graph or null.
All backends of one call must have the same transport.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor

from bench.model_shapes import LLAMA_8B, write_config
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import PlacementPlan, Stage, Transport
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.ranks.links import Links, connect, layout_of
from mgpu.worker.ranks.peer_group import ReduceLimits, peers_of
from mgpu.worker.ranks.peer_setup import SWITCH

AllReduce = Callable[[Tensor], Tensor]

PEER_S = 60.0
DIM = 4096
MOST_TOKENS = 1024  # of this hidden size in bfloat16: messages of up to 8 MiB
EPS = 1e-5
WARM_UP, GRAPH_CALLS, REPLAYS = 5, 20, 30


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to add up: what the plan says, and what is called."""

    transport: Transport
    kernels: Literal["", "one-shot", "two-shot"] = ""
    is_fused: bool = False
    """With residual add and RMSNorm behind it."""

    def call(self, links: Links, device: torch.device) -> AllReduce:
        """Return the function to time. RuntimeError if these ranks cannot use this backend."""
        stream_TD = torch.zeros(MOST_TOKENS, DIM, dtype=torch.bfloat16, device=device)
        weight_D = torch.ones(DIM, dtype=torch.bfloat16, device=device)
        peers = peers_of(links.group)
        if not self.kernels:
            return self._through(links.group if peers is None else peers.inner, stream_TD, weight_D)
        if peers is None:
            raise RuntimeError("; ".join(links.notes))
        kernel = peers.one_shot if self.kernels == "one-shot" else peers.two_shot
        assert kernel is not None
        if not self.is_fused:
            return lambda x: kernel(x, x, None, None)
        from mgpu.worker.kernels.peers.all_reduce import Residual

        return lambda x: kernel(x, torch.empty_like(x), Residual(stream_TD[: len(x)], weight_D, EPS), None)

    def _through(self, group: TensorParallelGroup, stream_TD: Tensor, weight_D: Tensor) -> AllReduce:
        if not self.is_fused:
            return group.all_reduce
        from mgpu.worker.kernels.layers.norm import add_rms_norm

        return lambda x: add_rms_norm(stream_TD[: len(x)], group.all_reduce(x), weight_D, EPS)


BACKENDS: dict[str, Backend] = {
    "nccl": Backend("nccl"),
    "nccl then residual + RMSNorm": Backend("nccl", is_fused=True),
    "one-shot": Backend("nccl", "one-shot"),
    "one-shot with residual + RMSNorm": Backend("nccl", "one-shot", is_fused=True),
    "two-shot": Backend("nccl", "two-shot"),
    "two-shot with residual + RMSNorm": Backend("nccl", "two-shot", is_fused=True),
    "gloo": Backend("gloo"),
    "shared-memory": Backend("shared-memory"),
}
"""Every way to add up that exists, by name."""


def spec_of(size: int, fd: int, folder: str, device: torch.device) -> WorkerSpec:
    """Return a spec with all fields that links read."""
    with tempfile.TemporaryDirectory() as model:
        checkpoint = read_checkpoint(write_config(Path(model), LLAMA_8B), "dummy")
    placement = PlacementPlan((Stage(0, checkpoint.facts.num_layers, tuple(range(size))),))
    spec = WorkerSpec(
        epoch=1,
        model=checkpoint.source,
        facts=checkpoint.facts,
        layout=Layout(placement, "bfloat16", transport="none", stage_transport="none"),
        limits=StepLimits(block_size=16, max_rows=64, max_batch_tokens=MOST_TOKENS, max_seq_len=128),
        device=str(device),
        endpoint="",
        rendezvous=f"file://{folder}/group",
        shared_fd=fd,
        shared_bytes=0,
        num_threads=1,
        memory_fraction=0.9,
        kv_memory=0,
        seed=0,
        worker_timeout_s=PEER_S,
    )
    return replace(spec, shared_bytes=layout_of(spec).total_bytes)


def calls_for(nbytes: int) -> int:
    """Say how often a message is sent; every rank must come to the same number."""
    return max(8, min(200, (16 << 20) // nbytes))


def eager_us(all_reduce: AllReduce, x: Tensor) -> float:
    """Return the median time of one call, until its result is there."""
    seconds = []
    for _ in range(WARM_UP + calls_for(x.nbytes)):
        began_s = time.perf_counter()
        all_reduce(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[WARM_UP:]) * 1e6


def shared_bytes(size: int) -> int:
    """Say how large the file must be that all ranks map."""
    return layout_of(spec_of(size, -1, "", torch.device("cpu"))).total_bytes


def graph_us(all_reduce: AllReduce, x: Tensor) -> float:
    """Return the median time per call of many calls in one CUDA graph, as in a decode step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(GRAPH_CALLS):
            all_reduce(x)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(x.device)
        times.append(begin.elapsed_time(end) * 1e3 / GRAPH_CALLS)
    return float(statistics.median(times[WARM_UP:]))


def check(backend: Backend, all_reduce: AllReduce, rank: int, size: int, device: torch.device) -> None:
    """Refuse to time something that does not add up; a constant row has the norm 1."""
    x = torch.full((8, DIM), rank + 1, dtype=torch.bfloat16, device=device)
    found = all_reduce(x)
    wanted = 1.0 if backend.is_fused else size * (size + 1) / 2
    assert torch.all(found == wanted), f"rank {rank}: {found.flatten()[:4].tolist()}"


def connected(backends: list[Backend], spec: WorkerSpec, rank: int, device: torch.device) -> Links:
    """Meet the other ranks, with kernels for all sizes, so that they can be timed beyond where servers use them."""
    (transport,) = {backend.transport for backend in backends}
    os.environ[SWITCH] = "1" if any(backend.kernels for backend in backends) else "0"
    limits = ReduceLimits(spec.layout.placement.world_size, DIM, torch.bfloat16, MOST_TOKENS, MOST_TOKENS)
    with patch.object(ReduceLimits, "of", lambda *_: limits):
        return connect(replace(spec, layout=replace(spec.layout, transport=transport)), rank, device)


@contextmanager
def warps_of(name: str) -> Iterator[None]:
    """Let kernels run with N warps where a backend is called ``…@N``."""
    if "@" not in name:
        yield
        return
    from mgpu.worker.kernels.peers import all_reduce, two_shot

    warps = int(name.partition("@")[2])
    with patch.object(all_reduce, "num_warps", lambda *_: warps), patch.object(two_shot, "num_warps", lambda *_: warps):
        yield


def measure(
    backend: Backend, all_reduce: AllReduce, lengths: list[int], device: torch.device
) -> list[tuple[int, float, float | None]]:
    """Return bytes, microseconds of a call, and of one in a CUDA graph, for every length."""
    results = []
    for nbytes in lengths:
        # Zeros stay zeros, however often added.
        x = torch.zeros(max(1, nbytes // 2 // DIM), min(DIM, nbytes // 2), dtype=torch.bfloat16, device=device)
        eager = eager_us(all_reduce, x)
        in_graph = graph_us(all_reduce, x) if device.type == "cuda" and backend.transport == "nccl" else None
        results.append((nbytes, eager, in_graph))
    return results


@torch.inference_mode()
def main() -> None:
    names, size_text, rank_text, fd, folder, device_name, lengths = sys.argv[1:]
    size, rank, device = int(size_text), int(rank_text), torch.device(device_name)
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backends = {name: BACKENDS[name.partition("@")[0]] for name in names.split(",")}
    links = connected(list(backends.values()), spec_of(size, int(fd), folder, device), rank, device)
    results = {}
    for name, backend in backends.items():
        with warps_of(name):
            all_reduce = backend.call(links, device)
            check(backend, all_reduce, rank, size, device)
            results[name] = measure(backend, all_reduce, [int(text) for text in lengths.split(",")], device)
    if rank == 0:
        print(json.dumps(results), flush=True)
    links.close()


if __name__ == "__main__":
    main()
