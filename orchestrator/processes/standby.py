"""Start every worker group, from standby workers if there are any.

Standby workers are processes of the next epoch that have imported torch, most of the start of a small model. They wait
on standard input for their spec and hold no GPU memory and no weights; each costs what a process with torch costs. When
the workers fail, they open their GPUs while the system takes back what the dead ones held, which takes a second. If
anything goes wrong with them, the next recovery is only slower.
"""

import logging
import time
from collections.abc import Callable

from mgpu.orchestrator.processes.group import Group

log = logging.getLogger(__name__)

RETRY_S = 60.0
"""Pause after a standby was lost, because the cause, such as a lack of memory, may last."""


class Standby:
    """Starts the worker group of every epoch, from waiting processes if there are any. For the main thread only."""

    def __init__(
        self,
        new_group: Callable[[int], Group],
        enabled: bool,
        delay_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``new_group`` makes a group of the given epoch that is not started.

        Standby workers begin to import ``delay_s`` after the workers are ready: prefilling again gets the cores first.
        """
        self._new_group = new_group
        self._enabled = enabled
        self._delay_s = delay_s
        self._clock_s = clock_s
        self._parked: Group | None = None
        self._due_s: float | None = None

    def prepare(self, epoch: int) -> None:
        """Have a group of ``epoch`` wait, a while after the first call. Call it often while the workers are ready."""
        if not self._enabled:
            return
        now_s = self._clock_s()
        if self._due_s is None:
            self._due_s = now_s + self._delay_s
        if self._parked is not None and not self._parked.is_whole:
            log.warning("a standby worker ended; the next ones start in %g s", RETRY_S)
            self.kill()
            self._due_s = now_s + RETRY_S
        if self._parked is None and now_s >= self._due_s:
            self._park(epoch, now_s)

    def _park(self, epoch: int, now_s: float) -> None:
        self._parked = self._new_group(epoch)
        try:
            self._parked.park()
        except OSError as error:  # no memory, process or descriptor is left; the server goes on without standby
            log.warning("standby workers cannot be started (%s); the next try is in %g s", error, RETRY_S)
            self.kill()
            self._due_s = now_s + RETRY_S

    def wake_up(self) -> None:
        """Have the standby workers open their GPUs, if there are any: they are started soon."""
        if self._parked is not None and self._parked.is_whole:
            self._parked.wake_up()

    def start_group(self, epoch: int, captures_library: bool = True) -> Group:
        """Start the group of ``epoch``, from the standby if that has this epoch and all its processes live.

        ``captures_library`` is as for `Group.start`.

        A group that cannot be started leaves nothing behind.
        """
        group, self._parked, self._due_s = self._parked, None, None
        if group is not None and (group.epoch != epoch or not group.is_whole):
            group.kill()
            group = None
        group = group or self._new_group(epoch)
        try:
            group.start(captures_library)
        except BaseException:
            group.kill()
            raise
        return group

    def kill(self) -> None:
        """Kill the standby workers."""
        if self._parked is not None:
            self._parked.kill()
            self._parked = None
