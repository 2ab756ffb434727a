"""Show how far a download is: one line that is written over on a terminal, single lines elsewhere."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

_TERMINAL_EVERY_S = 0.2
_LINES_EVERY_S = 30.0
_RATE_OVER_S = 15.0
"""The rate is that of the last seconds: downloads slow down and stop."""


class DownloadProgress:
    """Bytes of several files together. `add` may be called by several threads."""

    def __init__(
        self,
        name: str,
        total_bytes: int,
        report: Callable[[str], None],
        terminal: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._report, self._terminal, self._clock = name, total_bytes, report, terminal, clock
        self._done = 0
        self._kept = 0
        self._start_s = self._shown_s = clock()
        self._history: deque[tuple[float, int]] = deque([(self._start_s, 0)])
        self._lock = threading.Lock()
        self._width = 0

    def skip(self, nbytes: int) -> None:
        """Count bytes that an earlier download left; they are no part of the rate."""
        with self._lock:
            self._kept += nbytes

    def add(self, nbytes: int) -> None:
        """Count received bytes, or take them back with a negative number; show where the download is."""
        with self._lock:
            self._done += nbytes
            now = self._clock()
            if now - self._shown_s >= (_TERMINAL_EVERY_S if self._terminal else _LINES_EVERY_S):
                self._shown_s = now
                self._show(now)

    def _show(self, now: float) -> None:
        while len(self._history) > 1 and now - self._history[0][0] > _RATE_OVER_S:
            self._history.popleft()
        since, before = self._history[0]
        self._history.append((now, self._done))
        rate = max(0.0, (self._done - before) / (now - since)) if now > since else 0.0
        line = f"{self._name}: {progress_text(self._kept + self._done, self._total, rate)}"
        if self._terminal is None:
            self._report(line)
            return
        self._terminal.write("\r" + line.ljust(self._width))
        self._terminal.flush()
        self._width = len(line)

    def finish(self) -> None:
        """Say how much came in which time, on a line of its own."""
        with self._lock:
            self.clear()
            seconds = max(self._clock() - self._start_s, 0.001)
            kept = f", {size_text(self._kept)} were there" if self._kept else ""
            self._report(
                f"{self._name}: {size_text(self._done)} in {time_text(seconds)} "
                f"({size_text(round(self._done / seconds))}/s){kept}"
            )

    def clear(self) -> None:
        """Remove the line from the terminal, so that another can be written."""
        if self._terminal is not None and self._width:
            self._terminal.write("\r" + " " * self._width + "\r")
            self._terminal.flush()
            self._width = 0


def terminal_of_errors() -> TextIO | None:
    """Return standard error if it is a terminal."""
    return sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None


def progress_text(done: int, total: int, rate: float) -> str:
    """Return bytes, share, rate and the time left: ``1.2 of 4.4 GB (27 %), 112 MB/s, 29 s left``."""
    text = f"{size_text(done)} of {size_text(total)} ({100 * done // max(total, 1)} %), {size_text(round(rate))}/s"
    return text + (f", {time_text((total - done) / rate)} left" if rate > 0 and total > done else "")


def size_text(nbytes: int) -> str:
    """Return bytes in units of a thousand, with three digits."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 99.95 else f"{value:.3g} {unit}"


def time_text(seconds: float) -> str:
    """Return seconds below two minutes, then minutes, then hours."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
