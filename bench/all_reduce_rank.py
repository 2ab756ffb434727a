"""One rank of `all_reduce.py`: ``python all_reduce_rank.py BACKEND SIZE RANK FD FOLDER DEVICE BYTES,BYTES,…``.

Rank 0 prints one JSON list: message bytes, microseconds per call, and per call inside a CUDA graph or null.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from model_shapes import LLAMA_8B, write_config
from torch import Tensor

from mgpu.protocol.checkpoint import read_checkpoint
from mgpu.protocol.control import WorkerSpec
from mgpu.protocol.placement import PlacementPlan, Stage, Transport
from mgpu.worker.collectives import leave_process_group
from mgpu.worker.links import connect, layout_of

AllReduce = Callable[[Tensor], Tensor]
Backend = Callable[[WorkerSpec, int, torch.device], AllReduce]

PEER_S = 60.0
MOST_TOKENS = 1024  # of hidden size 4096 in bfloat16: messages of up to 8 MiB
WARM_UP, GRAPH_CALLS, REPLAYS = 5, 20, 30


def by_transport(transport: Transport) -> Backend:
    """Give what a server uses whose plan says ``transport``."""

    def make(spec: WorkerSpec, rank: int, device: torch.device) -> AllReduce:
        return connect(replace(spec, transport=transport), rank, device).group.all_reduce

    return make


BACKENDS: dict[str, Backend] = {
    "nccl": by_transport("nccl"),
    "gloo": by_transport("gloo"),
    "shared-memory": by_transport("shared-memory"),
}
"""Every way to add up that exists, by name. A further one is a line here: a function from spec, rank and device to the
call that is timed. `multi_gpu_all_reduce.WANTED` names those that are still to come."""


def spec_of(size: int, fd: int, folder: str, device: torch.device) -> WorkerSpec:
    """Give a spec that is complete as far as links read it."""
    with tempfile.TemporaryDirectory() as model:
        checkpoint = read_checkpoint(write_config(Path(model), LLAMA_8B), "dummy")
    spec = WorkerSpec(
        epoch=1,
        plan=PlacementPlan((Stage(0, checkpoint.facts.num_layers, tuple(range(size))),)),
        model=checkpoint.source,
        facts=checkpoint.facts,
        device=str(device),
        dtype="bfloat16",
        endpoint="",
        rendezvous=f"file://{folder}/group",
        transport="none",
        stage_transport="none",
        shared_fd=fd,
        shared_bytes=0,
        num_threads=1,
        block_size=16,
        max_rows=64,
        max_batch_tokens=MOST_TOKENS,
        max_seq_len=128,
        memory_fraction=0.9,
        kv_bytes=0,
        seed=0,
        timeout_s=PEER_S,
    )
    return replace(spec, shared_bytes=layout_of(spec).total_bytes)


def calls_for(nbytes: int) -> int:
    """Say how often a message is sent; every rank must come to the same number."""
    return max(8, min(200, (16 << 20) // nbytes))


def eager_us(all_reduce: AllReduce, x: Tensor) -> float:
    """Give the median time of a call that is waited for."""
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
    """Give the median time of a call among many in one CUDA graph, which is how decode steps would use it."""
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


def check(all_reduce: AllReduce, rank: int, size: int, device: torch.device) -> None:
    """Refuse to time something that does not add up."""
    x = torch.full((8, 4096), rank + 1, dtype=torch.bfloat16, device=device)
    found = all_reduce(x)
    assert torch.all(found == size * (size + 1) / 2), f"rank {rank}: {found.flatten()[:4].tolist()}"


@torch.inference_mode()
def main() -> None:
    backend, size_text, rank_text, fd, folder, device_name, lengths = sys.argv[1:]
    size, rank, device = int(size_text), int(rank_text), torch.device(device_name)
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    all_reduce = BACKENDS[backend](spec_of(size, int(fd), folder, device), rank, device)
    check(all_reduce, rank, size, device)
    results = []
    for nbytes in map(int, lengths.split(",")):
        x = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device=device)  # zeros stay zeros, however often added
        eager = eager_us(all_reduce, x)
        in_graph = (
            graph_us(all_reduce, x) if device.type == "cuda" and backend not in ("gloo", "shared-memory") else None
        )
        results.append((nbytes, eager, in_graph))
    if rank == 0:
        print(json.dumps(results), flush=True)
    leave_process_group()


if __name__ == "__main__":
    main()
