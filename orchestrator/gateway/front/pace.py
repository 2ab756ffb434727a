"""How much time clients' messages may take while requests run.

Turns by account divide the gateway's time between those who send messages. They do not leave any to the streams: on a
machine with few cores every second that goes into refusing a flood is one that workers and engine lack. So the time for
messages is earned, at a fifth of what passes, and what is earned and not spent is kept for a tenth of a second's worth
of messages. Example: after a quiet while, a burst of 300 requests of 0.25 ms each is served at once. A flood is served
for 0.1 s and then for 0.2 s of each second, in which its account gets the turns that others leave.

What others do for a message is spent too, by estimates: libzmq's own thread receives it, frame by frame, and the engine
works on requests that end before anything has come of them.
"""

import time
from collections.abc import Callable

SHARE = 0.2
MOST_S = 0.1
LEAST_S = 0.001
"""With less to spend, nothing is begun."""
FRAME_S, BYTE_S = 1e-6, 0.7e-9
"""What libzmq's thread needs: of a frame its reads, of a byte the copy, or with keys (1e-9) the deciphering."""
CANCEL_S = 0.0005
"""What the engine and the workers have done for a request that its client has begun and cancelled."""


class Pace:
    """The time that is earned and not spent."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._left_s, self._earned_s = MOST_S, clock_s()

    def left_s(self) -> float:
        """Return the time that may be spent now; negative after more was spent than there was."""
        now_s = self._clock_s()
        self._left_s = min(MOST_S, self._left_s + (now_s - self._earned_s) * SHARE)
        self._earned_s = now_s
        return self._left_s

    def wait_s(self) -> float:
        """Return how long to wait until something may be begun; 0 if that is now."""
        return max(0.0, LEAST_S - self.left_s()) / SHARE

    def spend(self, seconds: float) -> None:
        """Note what was spent. A debt is at most as large as the credit, and so a pause at most about half a second."""
        self._left_s = max(-MOST_S, self._left_s - seconds)
