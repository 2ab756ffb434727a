"""Try whether NCCL's calls can be part of CUDA graphs: not every version of NCCL and of the driver lets them.

Every rank captures, all tell each other how that went, and only then they replay: a rank whose capture failed would be
waited for on the device, for ever.
"""

import time

import torch

from mgpu.worker.errors import CaptureHung, PeerLost
from mgpu.worker.ranks.agreement import exchange
from mgpu.worker.ranks.collectives import DistGroup

_REPLAYS = 3
_SIZE = 4096


@torch.inference_mode()
def capture_problem(group: DistGroup, device: torch.device, timeout_s: float) -> str:
    """Return why sums cannot be captured, the same text on all ranks; empty if they can.

    CaptureHung after ``timeout_s``. The group has been used before, so its connections are open.
    """
    x = torch.zeros(_SIZE, device=device)
    graph = torch.cuda.CUDAGraph()
    try:
        out = _capture(group, graph, x)
        problem = ""
    except (RuntimeError, PeerLost) as error:
        problem = f"a capture failed: {(str(error).splitlines() or [''])[0]}"
    if reasons := _reasons(group, device, problem):
        return reasons
    for turn in range(_REPLAYS):
        x.fill_(turn + group.rank)
        graph.replay()
        _wait(device, timeout_s)
        total = group.size * turn + group.size * (group.size - 1) // 2
        wanted = torch.full((group.size,), total, dtype=x.dtype, device=device)
        if not torch.equal(out, wanted):
            problem = "a replay gave another sum"
    graph.reset()
    return _reasons(group, device, problem)


def _capture(group: DistGroup, graph: torch.cuda.CUDAGraph, x: torch.Tensor) -> torch.Tensor:
    """Capture a sum of copies of ``x`` and a gathering of one element of it, which the result holds."""
    torch.cuda.synchronize(x.device)
    with torch.cuda.stream(torch.cuda.Stream(x.device)):  # type: ignore[no-untyped-call]
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            out = group.all_gather(group.all_reduce(x.clone())[:1])
        finally:
            graph.capture_end()
    return out


def _reasons(group: DistGroup, device: torch.device, problem: str) -> str:
    statuses = exchange(group, device, problem)
    return "; ".join(f"rank {rank}: {status.problem}" for rank, status in enumerate(statuses) if status.problem)


def _wait(device: torch.device, timeout_s: float) -> None:
    """Wait for the device. CaptureHung if it is not done in time: NCCL's kernels of a graph have no deadline."""
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(device))
    deadline_s = time.monotonic() + timeout_s
    while not done.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline_s:
            raise CaptureHung(f"a captured sum of NCCL did not end within {timeout_s:g} s")
