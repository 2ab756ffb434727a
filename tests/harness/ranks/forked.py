"""Processes that are forked from one that has imported torch, for tests that need many workers.

An interpreter takes 1.7 CPU seconds to import what a worker needs; a fork takes hundredths. The child has the pipes,
the descriptors, the environment and the arguments of one that ``python -m MODULE`` starts.
"""

import fcntl
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.reduction import DupFd
from typing import Any

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["mgpu.worker.start.worker"])
_FIRST_SHARED = 200
"""Shared descriptors have numbers from here on, which are free in a forked process."""


class _Passed:
    """A descriptor that goes to the child with its arguments, where it has another number."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> "tuple[Callable[..., _Passed], tuple[object]]":
        return _receive, (DupFd(self.fd),)


def _receive(passed: Any) -> _Passed:
    return _Passed(passed.detach())


def shareable(fd: int) -> int:
    """Return the descriptor by a number that a forked process can give it too."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_SHARED)
    os.close(fd)
    return moved


class ForkedProcess:
    """``python -m MODULE ARGUMENT …`` with pipes for standard input and output, as far as tests use it of `Popen`."""

    def __init__(self, module: str, arguments: Sequence[str], shared: Sequence[int] = (), **environ: str) -> None:
        """``shared`` are numbers that `shareable` gave; the child has the same."""
        reads_input, writes_input = os.pipe()
        reads_output, writes_output = os.pipe()
        passed = {0: reads_input, 1: writes_output, 2: 2} | {fd: fd for fd in shared}
        handed = {number: _Passed(fd) for number, fd in passed.items()}
        self._process = _CONTEXT.Process(target=_run, args=(module, list(arguments), environ, handed))
        self._process.start()
        os.close(reads_input)
        os.close(writes_output)
        self.stdin: int | None = writes_input
        self.stdout: int | None = reads_output

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def write(self, data: bytes) -> None:
        """Write to the standard input of the process."""
        assert self.stdin is not None
        while data:
            data = data[os.write(self.stdin, data) :]

    def close_input(self) -> None:
        if self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None

    def read_line(self) -> str:
        """Return the next line of its standard output."""
        assert self.stdout is not None
        line = b""
        while not line.endswith(b"\n") and (byte := os.read(self.stdout, 1)):
            line += byte
        return line.decode()

    def read(self) -> str:
        """Return the rest of its standard output, when it has ended."""
        assert self.stdout is not None
        return b"".join(iter(lambda: os.read(self.stdout or 0, 1 << 16), b"")).decode()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """Return the exit status, as `Popen.wait` does."""
        self._process.join(timeout_s)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout_s)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        """Kill the process if it still runs, and close its pipes."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self.close_input()
        if self.stdout is not None:
            os.close(self.stdout)
            self.stdout = None


def _run(module: str, arguments: list[str], environ: Mapping[str, str], handed: Mapping[int, _Passed]) -> None:
    for number, passed in handed.items():
        os.dup2(passed.fd, number, inheritable=True)
    for passed in handed.values():
        os.close(passed.fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (multiprocessing has closed it)
    os.environ.update(environ)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
