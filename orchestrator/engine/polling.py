"""Say how long the engine may sleep: on GPUs a wake-up costs more than a short step leaves room for."""

import math


class Alertness:
    """Keeps the engine awake around the moment in which something is due. Times are CLOCK_MONOTONIC."""

    def __init__(self, spin_s: float) -> None:
        """``spin_s`` is how long to look for a thing without a pause before sleeping after all; 0: never look so."""
        self._spin_s = spin_s
        self._awake_until_s = 0.0

    def rouse(self, now_s: float) -> bool:
        """Stay awake for a moment, since work is about to come; false where nothing is looked for without a pause."""
        self._awake_until_s = now_s + self._spin_s
        return self._spin_s > 0

    def sleep_s(self, now_s: float, due_s: float | None) -> float:
        """Give how long to sleep at the most; 0 while it is better to look again at once.

        ``due_s`` is when the next result is expected, None when no step is in flight.
        """
        if not self._spin_s:
            return math.inf
        if due_s is None:
            return 0.0 if now_s < self._awake_until_s else math.inf
        opens_s, closes_s = due_s - self._spin_s / 2, due_s + self._spin_s / 2
        if now_s < opens_s:
            return opens_s - now_s
        return 0.0 if now_s < closes_s else math.inf
