"""Whose texts may be worked on now, so that long ones leave their time to the streams.

Texts are worked on by processes of a lower priority than the streams. On a contended core the kernel leaves them a
fifth of it all the same, and more whenever the worker waits for a moment. So on one core or two, while others have
requests, an owner whose texts have cost much lately has one of them worked on at a time, and all such owners together
have a twelfth of a core. Texts of other owners are begun at once. With three cores or more nobody waits: there are two
such processes.

Example: one owner sends texts of 60 ms beside the streams of another. The first ones are begun at once. From then on
one is begun every 0.7 s. The rest wait in line, where they count to the bounds of their owner.
"""

import math
import os
import time
from collections.abc import Callable

from mgpu.orchestrator.gateway.front.pace import FEW_CORES, Modest, Pace

SHARE, MOST_S, MOST_DEBT_S = 1 / 12, 0.1, 0.5
"""Of the time; what is saved up at most, and what is waited for at most. A text may take 4 s, and the next one of
another owner waits for it too."""


class TextPace:
    """What texts have cost, by owner, and the time that is left for those who have cost much."""

    def __init__(self, num_cores: int = 0, clock_s: Callable[[], float] = time.monotonic) -> None:
        """``num_cores`` 0: as many as this process may use."""
        self._is_needed = (num_cores or len(os.sched_getaffinity(0))) <= FEW_CORES
        self._pace = Pace(clock_s, SHARE, MOST_S, MOST_DEBT_S)
        self._modest = Modest(clock_s)
        self._clock_s = clock_s
        self._again_s = math.inf

    def lets(self, owner: str, num_running: int, has_company: bool) -> bool:
        """Return whether an owner may have a text begun, beside ``num_running`` of its own.

        ``has_company``: others have requests. If the answer is no for want of time, `wait_s` tells when to ask again.
        """
        if not (self._is_needed and has_company) or self._modest.has(owner):
            return True
        if num_running:
            return False
        if wait_s := self._pace.wait_s():
            self._again_s = self._clock_s() + wait_s
        return not wait_s

    def charge(self, owner: str, cpu_s: float) -> None:
        """Note what a text has cost."""
        if self._is_needed:
            if not self._modest.has(owner):
                self._pace.spend(cpu_s)
            self._modest.charge(owner, cpu_s)

    def wait_s(self) -> float:
        """Return how long to wait until `lets` may give another answer; infinite if that needs no waiting."""
        return max(0.0, self._again_s - self._clock_s())

    def is_due(self) -> bool:
        """Return True once when that time is over."""
        if self._clock_s() < self._again_s:
            return False
        self._again_s = math.inf
        return True
