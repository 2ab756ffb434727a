"""How long a step waits for the grammars of its rows, so that those of one client do not hold all streams for long."""

import time
from collections.abc import Callable

MOST_S = 2.0
"""A grammar that passed the gateway's check takes 0.5 s of CPU time at most, ordinary ones a few milliseconds."""
LEAST_S = 0.05
_SHARE = 0.05
"""Of the time of all streams, that may be lost to grammars that are given up."""


class Patience:
    """A budget that only waits in vain use up: a server whose forms are all ready in the end waits as it always did.

    Example: a first grammar that is never ready holds a step for 2 s, and the next ones for 0.05 s. Each second without
    such a wait gives 0.05 s back, so after 40 s a step waits 2 s again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left_s, self._at_s = MOST_S, clock()

    def limit_s(self) -> float:
        """Return how long a step may wait now."""
        now_s = self._clock()
        self._left_s = min(MOST_S, self._left_s + (now_s - self._at_s) * _SHARE)
        self._at_s = now_s
        return max(LEAST_S, self._left_s)

    def charge(self, waited_s: float) -> None:
        """Note that a step has waited in vain."""
        self._left_s = max(0.0, self._left_s - waited_s)
