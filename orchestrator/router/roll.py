"""Start one copy after the other again, without a refused request: the way to upgrade.

HOLD        no new requests for the copy; those it has may end, for the drain timeout at most
STOP        it is asked to end
START       the new process loads
(ready)     the next copy
"""

import logging
from collections.abc import Sequence
from enum import Enum, auto

from mgpu.orchestrator.router.copies import Copy

KILL_S = 15.0
"""What a copy gets to end after its time for requests."""
TOLD_S = 1.0
"""After this time a report of the router is younger than the order to hold a copy."""

log = logging.getLogger(__name__)


class _Step(Enum):
    HOLD = auto()
    STOP = auto()
    START = auto()


class Roll:
    """At most one copy is held, stopped or starts at a time."""

    def __init__(self, copies: Sequence[Copy], drain_timeout_s: float) -> None:
        self.done = 0
        """Copies that have been started again, in all."""
        self._copies = copies
        self._drain_timeout_s = drain_timeout_s
        self._left: list[Copy] = []
        self._step = _Step.HOLD
        self._held_s = self._drained_by_s = 0.0

    @property
    def is_going_on(self) -> bool:
        return bool(self._left)

    def begin(self) -> None:
        """Begin, unless it goes on already."""
        if self._left:
            log.warning("the copies are being started again already")
            return
        log.info("starting %d copies again, one after the other", len(self._copies))
        self._left = list(self._copies)
        self._step, self._drained_by_s = _Step.HOLD, 0.0

    def advance(self, now_s: float) -> None:
        """Take the next step if it is time."""
        if not self._left:
            return
        copy = self._left[0]
        if self._step is _Step.HOLD:
            self._hold(copy, now_s)
        elif self._step is _Step.STOP and not copy.is_gone:
            if now_s > self._drained_by_s + KILL_S:
                log.warning("%s does not stop and is killed", copy.name)
                copy.kill()
        elif self._step is _Step.STOP:
            self._step = _Step.START
            copy.start_again()
        elif self._step is _Step.START and copy.endpoint and copy.report.state == "ready":
            copy.is_held = False
            self.done += 1
            log.info("%s is ready again", copy.name)
            self._left.pop(0)
            self._step, self._drained_by_s = _Step.HOLD, 0.0

    def _hold(self, copy: Copy, now_s: float) -> None:
        others = [each for each in self._copies if each is not copy and each.takes_requests]
        if not others and len(self._copies) > 1:
            copy.is_held = False  # another one has just died: somebody must take requests
            return
        if not copy.is_held:
            copy.is_held = True
            self._held_s, self._drained_by_s = now_s, now_s + self._drain_timeout_s
        is_told = now_s - self._held_s > TOLD_S
        if not is_told or (copy.report.requests and now_s < self._drained_by_s):
            return
        copy.endpoint = ""  # what is left goes on elsewhere
        copy.begin_to_stop()
        self._step = _Step.STOP
        log.info("%s has no requests left and is stopped", copy.name)
