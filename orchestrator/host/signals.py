"""Turn SIGINT and SIGTERM into requests to stop, and SIGHUP into a request to reload; each wakes a poll loop.

SIGHUP has two senders. An administrator wants the files to be read again. The kernel sends it when the server's
terminal is gone; then the server stops, as programs do that were not started with nohup.
"""

import contextlib
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Collects signals to stop in ``received``, and notes reloads. Every signal makes ``fd`` readable.

    Use it as a context manager, in the main thread.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._reload_asked = False
        self._had_terminal = _has_terminal()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1

    @property
    def fd(self) -> int:
        return self._reader.fileno()

    def __enter__(self) -> "Signals":
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._collect)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def _collect(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and not (self._had_terminal and not _has_terminal()):
            self._reload_asked = True
        else:
            self.received.append(number)

    def take_reload(self) -> bool:
        """Return whether a reload was asked for since the last call."""
        asked, self._reload_asked = self._reload_asked, False
        return asked

    def ignore_reloads(self) -> None:
        """Ignore SIGHUP from now on, so that only a signal to stop makes ``fd`` readable."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def clear(self) -> None:
        """Empty ``fd``, so that it is readable again at the next signal."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(64):
                pass


def _has_terminal() -> bool:
    """Return whether this process belongs to a terminal that still exists."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def end_process(status: int) -> NoReturn:
    """Exit with ``status``; a negative one ends the process by that signal, so that the parent sees the truth.

    The first process of a PID namespace, such as a container's, cannot be ended by its own signal. It exits with what a
    shell would report: 128 and the signal's number.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(128 - status if status < 0 else status)


def end_first_process_at_sigterm() -> None:
    """Let SIGTERM end this process if it is the first of a PID namespace, where the default action does not apply."""
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end_at_once)


def end_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    """Do what the default action of a signal does. Nothing is waited for, such as the threads of a download."""
    os._exit(128 + number)
