"""Time two ways to add up, at start: own kernels through host memory, and NCCL. Machines differ in which is quicker."""

import statistics
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mgpu.worker.errors import PeerLost
from mgpu.worker.ranks.agreement import CannotUse, exchange
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.ranks.peer_group import PeerGroup

SIZES = (1, 8, 16, 32, 64, 128, 256, 512)
"""Rows that are timed: those of decode graphs, since kernels serve up to a size."""
_CALLS, _REPLAYS = 4, 7
_EPS = 1e-5
Sum = Callable[[Tensor, Tensor], Tensor]


def quickest_rows(
    kernels: PeerGroup, library: TensorParallelGroup, host_group: TensorParallelGroup, device: torch.device
) -> int:
    """Return up to how many rows the kernels are quicker, the same on all ranks; 0 if nowhere. CannotUse on any error.

    Both add up, add to a residual stream and normalize, in CUDA graphs, as layers do.
    """
    from mgpu.worker.kernels.layers.norm import add_rms_norm

    sizes = [size for size in SIZES if size <= kernels.most_rows]
    weight_D = torch.ones(kernels.limits.dim, dtype=kernels.limits.dtype, device=device)
    ways: tuple[Sum, Sum] = (
        lambda stream_TD, x_TD: kernels.add_and_norm(stream_TD, x_TD, None, weight_D, _EPS),
        lambda stream_TD, x_TD: add_rms_norm(stream_TD, library.all_reduce(x_TD), weight_D, _EPS),
    )
    problem, mine = "", [0.0] * (len(sizes) * len(ways))
    try:
        mine = [_median_us(way, rows, kernels, device) for rows in sizes for way in ways]
    except PeerLost:
        raise
    except RuntimeError as error:  # such as no memory for a graph, or a library that cannot be captured
        problem = f"sums cannot be timed: {str(error).splitlines()[0]}"
    statuses = exchange(host_group, device, problem, struct.pack(f"<{len(mine)}f", *mine))
    if problem := next((status.problem for status in statuses if status.problem), ""):
        raise CannotUse(problem)
    slowest = [max(us) for us in zip(*(struct.unpack(f"<{len(mine)}f", each.handle) for each in statuses), strict=True)]
    return rows_of_kernels(sizes, slowest[::2], slowest[1::2])


def rows_of_kernels(sizes: Sequence[int], kernels_us: Sequence[float], library_us: Sequence[float]) -> int:
    """Return the largest size up to which the kernels are nowhere slower; 0 if they are at the first."""
    best = 0
    for size, kernel_us, other_us in zip(sizes, kernels_us, library_us, strict=True):
        if kernel_us > other_us:
            break
        best = size
    return best


@torch.inference_mode()
def _median_us(way: Sum, rows: int, kernels: PeerGroup, device: torch.device) -> float:
    """Return the time of one sum in a graph of several."""
    shape, dtype = (rows, kernels.limits.dim), kernels.limits.dtype
    x_TD, stream_TD = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    way(stream_TD, x_TD)  # compiles and loads
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(_CALLS):
                way(stream_TD, x_TD)
        finally:
            graph.capture_end()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) * 1e3 / _CALLS)
    graph.reset()
    return float(statistics.median(times))
