"""Ranks of a test as real processes that share one file in memory, and what they print."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DEADLINE_S = 120.0


@contextmanager
def rank_processes(
    module: str, size: int, shared_bytes: int, *arguments: str
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Run ``python -m MODULE RANK FD ARGUMENT …`` for every rank; none survives the block.

    FD is a file of ``shared_bytes`` zeros in memory, the same for all ranks.
    """
    fd = os.memfd_create("mgpu-test")
    processes: list[subprocess.Popen[str]] = []
    try:
        os.ftruncate(fd, shared_bytes)
        for rank in range(size):
            command = [sys.executable, "-m", module, str(rank), str(fd), *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            processes.append(subprocess.Popen(command, pass_fds=[fd], text=True, **pipes))
        yield processes
    finally:
        os.close(fd)
        for process in processes:
            process.kill()
            process.communicate()


def outputs(processes: list["subprocess.Popen[str]"]) -> list[str]:
    """Return what each rank has printed when it has ended."""
    return [process.communicate(timeout=DEADLINE_S)[0].strip() for process in processes]
