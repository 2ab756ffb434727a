"""Replace processes that failed: how often that may happen, and the way from a dead worker group to one that works.

The engine keeps every request (sequence.py), so that workers can be thrown away as a whole: after a failure the old
group is killed, one of the next epoch loads, and the requests are prefilled again from what is known of them.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from mgpu.orchestrator.errors import with_traceback
from mgpu.orchestrator.processes.standby import Standby
from mgpu.orchestrator.processes.worker_group import WorkerGroup

log = logging.getLogger(__name__)


class WorkersHung(Exception):
    """The workers live but do nothing."""


class TooManyRestarts(Exception):
    """It fails again and again: someone who can change more than this process must decide."""


class RestartLimit:
    """Allow ``most`` restarts of something within any ``window_s`` seconds."""

    def __init__(self, most: int, window_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        """Restarts since the beginning."""
        self._most = most
        self._window_s = window_s
        self._clock_s = clock_s
        self._recent_s: deque[float] = deque()

    def note(self, cause: Exception, is_free: bool = False) -> None:
        """Count a restart that is about to be made. TooManyRestarts, with the cause, when it is one too many.

        ``is_free``: it is none of those that are limited; whoever wants the server to end could else see to it.
        """
        if is_free:
            self.count += 1
            return
        now_s = self._clock_s()
        while self._recent_s and now_s - self._recent_s[0] > self._window_s:
            self._recent_s.popleft()
        if len(self._recent_s) >= self._most:
            raise TooManyRestarts(
                f"giving up after {self._most} restarts within {self._window_s:g} s; the last cause: {cause}"
            ) from cause
        self._recent_s.append(now_s)
        self.count += 1


class WorkerRecovery:
    """The worker group of the current epoch, and its replacement. One call of `advance` per message or timeout."""

    def __init__(
        self,
        group: WorkerGroup,
        standby: Standby,
        num_blocks: int,
        limit: RestartLimit,
        silence_timeout_s: float,
    ) -> None:
        """``group`` is ready and has ``num_blocks``; ``standby`` gives the next ones."""
        self.group = group
        self.num_blocks = self._most_blocks = num_blocks
        self.limit = limit
        self.is_ready = True
        self.last_s = 0.0
        """What the last recovery took, from noticing the failure to workers that are ready."""
        self._standby = standby
        self._silence_timeout_s = silence_timeout_s
        self._began_s = self._moved_s = 0.0
        self._allocated = False
        self._seen: object = None

    def begin(self, cause: Exception) -> None:
        """Kill what is left of the group and start the next one. TooManyRestarts when that happened too often."""
        if self.is_ready:
            self._began_s = time.monotonic()
        self.is_ready = self._allocated = False
        log.error("%s", with_traceback(cause))
        self.limit.note(cause)
        self.group.kill()
        self.group = self._standby.start_group(self.group.epoch + 1)
        self._moved_s = time.monotonic()
        log.warning("restart %d: starting the workers again as epoch %d", self.limit.count, self.group.epoch)

    def advance(self) -> None:
        """Go on with what the new group has said. WorkersHung when it is silent for too long."""
        group = self.group
        if not self._allocated and len(group.loaded) == len(group.processes):
            self.num_blocks = group.allocate_cache(at_most=self._most_blocks)
            self._allocated = True
        if len(group.ready) == len(group.processes):
            self.is_ready = True
            self.last_s = time.monotonic() - self._began_s
            return
        self._check_progress()

    def prepare_standby(self) -> None:
        """Prepare for the next failure; call it often while the workers are ready."""
        self._standby.prepare(self.group.epoch + 1)

    def _check_progress(self) -> None:
        group = self.group
        seen = (len(group.loaded), len(group.ready), list(group.progress.values()))
        if seen != self._seen:
            self._seen, self._moved_s = seen, time.monotonic()
        elif time.monotonic() - self._moved_s > self._silence_timeout_s:
            raise WorkersHung(f"the new workers have said nothing for {self._silence_timeout_s:g} s")
