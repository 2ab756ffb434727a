"""The workers, through all epochs: lead each from spawned to ready, and replace them when they fail.

The engine keeps every sequence (sequence.py), so workers can be thrown away as a whole: after a failure the old group
is killed, the group of the next epoch loads, and the sequences are prefilled again from what is known of them. The
start of the server is epoch 0, and uses the same code.
"""

import logging
import time
from collections.abc import Callable, Container

from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.processes.failures import (
    HostLost,
    ProcessFailure,
    RestartLimit,
    WorkerLost,
    WorkersHung,
)
from mgpu.orchestrator.processes.group import Group
from mgpu.orchestrator.processes.standby import Standby
from mgpu.orchestrator.processes.worker_group import WorkerGroup, ZmqContext
from mgpu.protocol.model.kv_pools import PoolSize

log = logging.getLogger(__name__)

RELOAD_SILENCE_S = 60.0
RELOAD_FACTOR = 10.0
"""Workers that load again count as hung after 10 times the duration of the first start, at least 60 s, of silence."""


class WorkerProcesses:
    """The worker group of the current epoch and its replacement.

    Use it as a context manager; leaving it kills the processes.
    """

    def __init__(
        self,
        context: ZmqContext,
        runtime: RuntimeDir,
        config: ServerConfig,
        new_group: Callable[[int], Group] | None = None,
    ) -> None:
        """``new_group`` makes the group of an epoch, not started; None: of processes of this machine."""
        new_group = new_group or (lambda epoch: WorkerGroup(context, runtime, config, epoch))
        self.group = new_group(0)
        """Of the current epoch; not started before `start`."""
        self.is_ready = False
        self.pool = PoolSize(0)
        """Of keys and values, in this epoch, once it is allocated."""
        self.last_recovery_s = 0.0
        """From noticing the failure to workers that are ready."""
        self.loaded_bytes = 0
        """Weights that workers of all epochs have read from files."""
        self.captures_library = True
        """Whether sums of NCCL may be part of CUDA graphs: until workers hang that may have such graphs."""
        self._has_library = config.device_kind == "cuda" and config.layout.transport == "nccl"
        restarts = config.restarts
        self.restarts = RestartLimit(restarts.max_restarts, restarts.restart_window_s)
        self._standby = Standby(new_group, restarts.standby, restarts.standby_delay_s)
        self._largest_pool: PoolSize | None = None
        """The first one: later ones are never larger."""
        self._longest_silence_s = self._start_timeout_s = config.timeouts.start_timeout_s
        self._began_s = self._moved_s = 0.0
        self._is_allocated = False
        self._seen: object = None

    def __enter__(self) -> "WorkerProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self._standby.kill()
        self.group.kill()

    def start(self) -> None:
        """Start the workers of epoch 0."""
        self._began_s = time.monotonic()
        self._start_epoch(0)

    def advance(self, events: Container[object]) -> bool:
        """Take in the ``events`` of a poll; lead the epoch on. Return True at the moment in which it becomes ready.

        WorkerLost for the earliest failure; WorkersHung when workers that load say nothing for too long.
        """
        group = self.group
        group.take_in(events)
        if self.is_ready:
            return False
        if not self._is_allocated and len(group.loaded) == group.world_size:
            self.pool = group.allocate_cache(self._largest_pool)
            self._is_allocated = True
        if len(group.ready) < group.world_size:
            self._check_silence()
            return False
        self._become_ready()
        return True

    def replace(self, failure: ProcessFailure) -> None:
        """Kill what is left of the group and start the next epoch. TooManyRestarts when that happened too often."""
        if self.is_ready:
            self._began_s = time.monotonic()
        # A launcher that starts ranks again, one after the other, ends several epochs that never were ready.
        is_part = not self.is_ready and isinstance(failure, HostLost)
        is_free = is_part and time.monotonic() - self._began_s < self._start_timeout_s
        self.is_ready = False
        log.error("%s", failure.report)
        if self.may_avoid(failure):
            self.captures_library = False
            log.warning("from now on sums of NCCL are not part of CUDA graphs, where nothing ends a sum that hangs")
        self._standby.wake_up()
        if isinstance(failure, WorkersHung) or log.isEnabledFor(logging.DEBUG):
            self.group.kill_with_stacks()  # they show where a rank hangs; after a death they would hide its cause
        else:
            self.group.kill_at_once()
        self.restarts.note(failure, is_free)
        self._start_epoch(self.group.epoch + 1)
        log.warning("restart %d: starting the workers again as epoch %d", self.restarts.count, self.group.epoch)

    def may_avoid(self, failure: ProcessFailure) -> bool:
        """Return True if the workers of the next epoch, which capture no sums of NCCL, need not fail like this."""
        hangs = isinstance(failure, WorkersHung) or (isinstance(failure, WorkerLost) and failure.in_capture)
        return hangs and self._has_library and self.captures_library

    def prepare_standby(self) -> None:
        """Prepare for the next failure; call it often while the workers are ready."""
        self._standby.prepare(self.group.epoch + 1)

    def stop(self, deadline_s: float, hurry_fd: int) -> None:
        """Tell the workers to leave, kill them at CLOCK_MONOTONIC ``deadline_s`` or when ``hurry_fd`` is readable."""
        self.group.stop(deadline_s, hurry_fd)
        self._standby.kill()

    def _start_epoch(self, epoch: int) -> None:
        self.group = self._standby.start_group(epoch, self.captures_library)
        self._is_allocated = False
        self._moved_s = time.monotonic()

    def _become_ready(self) -> None:
        self.is_ready = True
        self.loaded_bytes += sum(each.loaded_bytes for each in self.group.ready.values())
        took_s = time.monotonic() - self._began_s
        if self._largest_pool is None:
            self._largest_pool = self.pool
            self._longest_silence_s = min(self._start_timeout_s, max(RELOAD_SILENCE_S, RELOAD_FACTOR * took_s))
        else:
            self.last_recovery_s = took_s

    def _check_silence(self) -> None:
        group = self.group
        seen = (len(group.loaded), len(group.ready), list(group.progress.values()))
        if seen != self._seen or group.is_waiting:
            self._seen, self._moved_s = seen, time.monotonic()
        elif time.monotonic() - self._moved_s > self._longest_silence_s:
            raise WorkersHung(f"the new workers have said nothing for {self._longest_silence_s:g} s")
