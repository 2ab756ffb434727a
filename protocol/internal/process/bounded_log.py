"""Log lines that clients bring about, bounded so that nobody can fill the disk with them."""

import logging
import time
from collections.abc import Callable

INTERVAL_S = 1.0


class BoundedLog:
    """One kind of line: written at most once a second, and then with the number of those left out before."""

    def __init__(self, logger: logging.Logger, level: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._level = level
        self._clock_s = clock_s
        self._next_s = -1.0
        self._left_out = 0

    def write(self, text: str, *arguments: object, error: BaseException | None = None) -> None:
        """Write the line, with the traceback of ``error``, or count it as left out."""
        now_s = self._clock_s()
        if now_s < self._next_s:
            self._left_out += 1
            return
        more = f" ({self._left_out} more since the last such line)" if self._left_out else ""
        self._next_s, self._left_out = now_s + INTERVAL_S, 0
        self._logger.log(self._level, f"{text}%s", *arguments, more, exc_info=error)
