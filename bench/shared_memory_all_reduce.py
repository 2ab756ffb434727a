"""Time the all-reduce of CPU workers: shared memory beside gloo.

    python bench/shared_memory_all_reduce.py [--floats 576]

Prints the median and the 90th percentile per group size, as seen by rank 0. One thread per process.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mgpu.protocol.placement import PlacementPlan, Stage
from mgpu.protocol.shared_layout import shared_layout
from mgpu.worker.collectives import DistGroup, start_process_group
from mgpu.worker.shared_memory import SharedMemoryGroup, SharedSegment


def time_calls(all_reduce: Callable[[Tensor], Tensor], floats: int, calls: int) -> list[float]:
    """Give sorted seconds per call, after a few that do not count."""
    seconds = []
    for index in range(calls + 50):
        x = torch.ones(1, floats)
        began = time.perf_counter()
        all_reduce(x)
        if index >= 50:
            seconds.append(time.perf_counter() - began)
    return sorted(seconds)


def run_rank(rank: int, size: int, fd: int, folder: str, floats: int) -> None:
    torch.set_num_threads(1)
    plan = PlacementPlan((Stage(0, 1, tuple(range(size))),))
    layout = shared_layout(plan, max_batch_tokens=512, max_rows=8, hidden_size=max(floats, 576), dtype_bytes=4)
    os.ftruncate(fd, layout.total_bytes)
    segment = SharedSegment(fd, layout, rank, timeout_s=30)
    shared = SharedMemoryGroup(segment, layout.reduce[0], rank, range(size))
    start_process_group(f"file://{folder}/pg", rank, size, nccl_device=None, start_s=30, timeout_s=30)
    assert dist.group.WORLD is not None
    gloo = DistGroup(dist.group.WORLD, rank, size)
    calls = 2000 if floats < 10_000 else 200
    with torch.inference_mode():
        for name, group in (("shared memory", shared), ("gloo", gloo)):
            seconds = time_calls(group.all_reduce, floats, calls if name != "gloo" else calls // 5)
            if rank == 0:
                median, high = statistics.median(seconds), seconds[len(seconds) * 9 // 10]
                print(
                    f"{size} ranks, {4 * floats} bytes, {name}: median {median * 1e6:.0f} µs, p90 {high * 1e6:.0f} µs"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floats", type=int, default=576, help="length of the reduced vector")
    floats = parser.parse_args().floats
    for size in (2, 3, 4):
        fd = os.memfd_create("mgpu-bench")
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(size):
                pid = os.fork()
                if pid == 0:
                    run_rank(rank, size, fd, folder, floats)
                    sys.stdout.flush()
                    os._exit(0)
                children.append(pid)
            for pid in children:
                os.waitpid(pid, 0)
        os.close(fd)


if __name__ == "__main__":
    main()
