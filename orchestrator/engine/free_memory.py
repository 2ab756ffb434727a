"""Return memory to the system after many requests have ended: the allocator would keep what they have held.

It takes milliseconds, in which no step is planned. So it is done when most of what was in flight has gone, and not
while requests come and go.
"""

import time
from collections.abc import Callable

from mgpu.protocol.internal.process.free_memory import release_free_memory

MANY = 256
"""Sequences of which fewer hold too little."""
INTERVAL_S = 5.0


class FreeMemory:
    """The most sequences in flight since memory was released."""

    def __init__(
        self, clock_s: Callable[[], float] = time.monotonic, release: Callable[[], None] = release_free_memory
    ) -> None:
        self._clock_s, self._release = clock_s, release
        self._most, self._next_s = 0, 0.0

    def look(self, num_live: int) -> None:
        """Release memory if less than half of what was in flight is left. Call it often."""
        self._most = max(self._most, num_live)
        if self._most >= MANY and 2 * num_live < self._most and self._clock_s() >= self._next_s:
            self._most, self._next_s = num_live, self._clock_s() + INTERVAL_S
            self._release()
