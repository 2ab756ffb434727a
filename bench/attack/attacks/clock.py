"""How long an attack goes on."""

import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Until when to go on, by CLOCK_MONOTONIC."""

    end_s: float

    @property
    def left_s(self) -> float:
        return max(0.0, self.end_s - time.monotonic())

    def turns(self, pause_s: float = 0.0) -> Iterator[int]:
        """Count turns until the time is over."""
        number = 0
        while self.left_s:
            yield number
            number += 1
            if pause_s:
                time.sleep(min(pause_s, self.left_s))
