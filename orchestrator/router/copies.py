"""The processes of `serve --replicas`: whole servers, started, watched and replaced by the router's process."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.processes.child_process import ChildProcess, ProcessStartError, describe_exit
from mgpu.orchestrator.processes.failures import RestartPause
from mgpu.protocol.discovery import BASE_VARIABLE, running_servers
from mgpu.protocol.internal.router_messages import ReplicaReport

COPY_VARIABLE = "MGPU_COPY"
"""Tells a server that it is a copy, its name and whose: ``NAME:PID``. It ends with the process of this number."""
LOOK_S = 0.2
"""How often a copy that starts is looked for."""

log = logging.getLogger(__name__)


class CopyFailed(UserError):
    """A copy has ended before it was ready for the first time; its exit code is that of the whole server."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class CopyCommand:
    """How one copy is started."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    cpus: frozenset[int]
    """Cores that it may use."""


class Copy:
    """One server process behind the router, from start to start."""

    def __init__(self, name: str, command: CopyCommand, base: Path) -> None:
        """``base`` is the folder for its own runtime folder, where no client looks."""
        self.name = name
        self.endpoint = ""
        """Where the router finds it; empty while it is not there."""
        self.is_held = False
        """It gets no new requests."""
        self.report = ReplicaReport(name, "unreachable", 0)
        """The last that the router has said of it."""
        self.restarts = 0
        self._command = command
        self._base = base
        self._child: ChildProcess | None = None
        self._pause = RestartPause()
        self._start_at_s = 0.0
        self._look_at_s = 0.0
        self._was_ready = False
        self._is_stopping = False

    @property
    def fds(self) -> list[int]:
        """What becomes readable when it ends."""
        return [] if self._child is None else [self._child.pidfd]

    @property
    def is_gone(self) -> bool:
        return self._child is None

    @property
    def takes_requests(self) -> bool:
        return bool(self.endpoint) and self.report.state in ("ready", "stalled", "recovering") and not self.is_held

    def advance(self, now_s: float) -> None:
        """Start it when it is due, connect when it is ready, notice its end. CopyFailed before it was ready once."""
        if self._child is None:
            if now_s >= self._start_at_s and not self._is_stopping:
                self._start()
            return
        status = self._child.exit_status()
        if status is not None:
            self._on_end(status)
        elif not self.endpoint and now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_S
            for server in running_servers({BASE_VARIABLE: str(self._base)}):
                if server.pid == self._child.pid:
                    self.endpoint = server.endpoint
        if self.takes_requests:
            self._was_ready = True

    def _start(self) -> None:
        with contextlib.suppress(OSError):  # the folder above is made again in a moment; the start fails then
            self._base.mkdir(mode=0o700, exist_ok=True)
        env = {**self._command.env, BASE_VARIABLE: str(self._base), COPY_VARIABLE: f"{self.name}:{os.getpid()}"}
        ours = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._command.cpus)  # a child inherits it
        try:
            self._child = ChildProcess(self.name, self._command.command, None, env)
        except ProcessStartError as error:
            if not self._was_ready:
                raise CopyFailed(str(error), 1) from error
            log.error("%s", error)
            self._start_at_s = time.monotonic() + RestartPause.LONGEST_S
        finally:
            os.sched_setaffinity(0, ours)

    def _on_end(self, status: int) -> None:
        assert self._child is not None
        self._child.kill()  # what is left of its session
        self._child, self.endpoint = None, ""
        if not self._was_ready and not self._is_stopping:
            raise CopyFailed(f"{self.name} {describe_exit(status)} before it was ready", max(status, 1))
        if self._is_stopping:
            return
        pause_s = self._pause.next_s()
        self.restarts += 1
        log.error("%s %s; it is started again", self.name, describe_exit(status))
        self._start_at_s = time.monotonic() + pause_s

    def begin_to_stop(self) -> None:
        """Ask it to end; it is not started again before `start_again`."""
        self._is_stopping = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def start_again(self) -> None:
        """Let `advance` start it, once it has ended."""
        self._is_stopping, self._start_at_s = False, 0.0

    def wait(self, deadline_s: float) -> bool:
        """Return whether it has ended by ``deadline_s``."""
        return self._child is None or self._child.wait(deadline_s)

    def kill(self) -> None:
        """End it at once. The kernel ends its workers, and its gateway removes its files."""
        if self._child is not None:
            self._child.kill()
            self._child, self.endpoint = None, ""
