"""Who has sent what no library sends, and is not let in for a while, longer each time.

libzmq receives all of a message before the gateway sees its first frame, and all of its frames have to be read one by
one. So a message with too many is refused, and some are tolerated. Who goes on is stopped only by ending the
connection, and who connects again at once has lost nothing. So from the second time on no other connection of its owner
is let in: for 1 s, then 2, 4 and so on up to `LONGEST_S`. Each quiet minute takes one step back. Open connections of
the owner are kept: on ipc they may be those of an innocent part of a program. An address may be that of many, so it is
not shut out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mgpu.orchestrator.gateway.front.account import KEY_PREFIX
from mgpu.orchestrator.gateway.front.transport.descriptors import PROCESS

FIRST_S, LONGEST_S = 1.0, 16.0
QUIET_S = 60.0
TOLERATED_FRAMES, TOLERATED_PER_S = 200_000, 2000
"""Frames that no message has, of one owner. Reading them has taken a tenth of a second or two."""
_MOST_OWNERS = 4096


@dataclass(slots=True)
class _Strikes:
    count: int = 0
    last_s: float = 0.0
    frames: float = 0.0
    frames_s: float = 0.0
    """When ``frames`` was right."""


class ShutOut:
    """Owners, and until when they are not let in."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._until_s: dict[str, float] = {}
        self._strikes: dict[str, _Strikes] = {}

    def add(self, owner: str, seconds: float) -> None:
        """Keep an owner out from now on."""
        self._until_s[owner] = self._clock_s() + seconds

    def has(self, owner: str) -> bool:
        """Return whether an owner is not to be let in now."""
        until_s = self._until_s.get(owner)
        if until_s is None:
            return False
        if until_s > self._clock_s():
            return True
        del self._until_s[owner]
        return False

    def tolerates(self, owner: str, num_frames: int) -> bool:
        """Count so many frames that no message has; return False if that is too much of an owner."""
        strikes, now_s = self._of(owner), self._clock_s()
        strikes.frames = max(0.0, strikes.frames - (now_s - strikes.frames_s) * TOLERATED_PER_S) + num_frames
        strikes.frames_s = now_s
        return strikes.frames <= TOLERATED_FRAMES

    def strike(self, owner: str) -> None:
        """Note that a connection of an owner had to be ended."""
        if not owner.startswith((KEY_PREFIX, PROCESS)):
            return
        strikes, now_s = self._of(owner), self._clock_s()
        strikes.count = max(0, strikes.count - int((now_s - strikes.last_s) / QUIET_S))
        if strikes.count:
            self.add(owner, min(FIRST_S * 2 ** min(strikes.count - 1, 30), LONGEST_S))
        strikes.count, strikes.last_s = strikes.count + 1, now_s

    def _of(self, owner: str) -> _Strikes:
        if owner not in self._strikes and len(self._strikes) >= _MOST_OWNERS:
            long_ago_s = self._clock_s() - QUIET_S
            self._strikes = {
                name: each for name, each in self._strikes.items() if max(each.last_s, each.frames_s) > long_ago_s
            }
        return self._strikes.setdefault(owner, _Strikes())
