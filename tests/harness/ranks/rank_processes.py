"""Ranks of a test as real processes that share one file in memory, and what they print."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from harness.ranks.forked import ForkedProcess, shareable

DEADLINE_S = 120.0


@contextmanager
def rank_processes(module: str, size: int, shared_bytes: int, *arguments: str) -> Iterator[list[ForkedProcess]]:
    """Run ``python -m MODULE RANK FD ARGUMENT …`` for every rank; none survives the block.

    FD is a file of ``shared_bytes`` zeros in memory, the same for all ranks.
    """
    fd = shareable(os.memfd_create("mgpu-test"))
    processes: list[ForkedProcess] = []
    try:
        os.ftruncate(fd, shared_bytes)
        for rank in range(size):
            processes.append(ForkedProcess(module, [str(rank), str(fd), *arguments], [fd]))
        yield processes
    finally:
        os.close(fd)
        for process in processes:
            process.close()


def outputs(processes: list[ForkedProcess]) -> list[str]:
    """Return what each rank has printed when it has ended."""
    for process in processes:
        process.wait(DEADLINE_S)
    return [process.read().strip() for process in processes]
