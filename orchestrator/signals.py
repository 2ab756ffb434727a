"""Turn SIGINT and SIGTERM into requests to stop that a poll loop sees at once."""

import contextlib
import os
import signal
import socket
import sys
from types import FrameType, TracebackType
from typing import Any, NoReturn

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While entered, signals are collected in ``received`` and make ``fd`` readable. Main thread only."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1

    @property
    def fd(self) -> int:
        return self._reader.fileno()

    def __enter__(self) -> "StopSignals":
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._collect)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def _collect(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def clear(self) -> None:
        """Make ``fd`` wait for the next signal."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(64):
                pass


def end_process(status: int) -> NoReturn:
    """Exit with ``status``; a negative one ends the process by that signal, so that the parent sees the truth."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
