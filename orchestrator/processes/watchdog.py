"""Notice a process that lives but does nothing: ask for a sign of life every second, add up how long none came."""

import time
from collections.abc import Callable

ASK_INTERVAL_S = 1.0
LONGEST_GAP_S = 2.0
"""Most that the time between two looks counts: a parent that was stopped itself has not listened meanwhile."""


class Pulse:
    """The silence of one process, as somebody has seen it who looks about once a second."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.silent_s = 0.0
        """Without a sign of life, as of the last look."""
        self._clock_s = clock_s
        self._looked_s = self._asked_s = clock_s()

    def heard(self) -> None:
        """Note a sign of life."""
        self.silent_s = 0.0

    def look(self) -> bool:
        """Add the time since the last look to the silence; tell whether to ask again."""
        now_s = self._clock_s()
        self.silent_s += min(now_s - self._looked_s, LONGEST_GAP_S)
        self._looked_s = now_s
        if now_s - self._asked_s < ASK_INTERVAL_S:
            return False
        self._asked_s = now_s
        return True
