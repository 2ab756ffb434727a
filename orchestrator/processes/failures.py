"""What becomes of a failure, on one path.

A child's last message, its exit status or its silence becomes a `ProcessFailure`. While the server starts, it ends the
server, unless clients caused it at the gateway; later the process is replaced, within a `RestartLimit`, or after a
`RestartPause` if clients may have caused it. `ending_of`
turns whatever ends the server into the log line, the text for clients and systemd, and the exit status.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.processes.child_process import ProcessStartError
from mgpu.orchestrator.processes.task_limits import task_limit_hint

log = logging.getLogger(__name__)

_NO_THREAD = "can't start new thread"
"""What Python says where the limit of processes and threads is reached."""


class ProcessFailure(Exception):
    """A child process failed, died or hangs."""

    prefix = ""

    def __init__(
        self, message: str, traceback: str = "", is_mistake: bool = False, caused_by_clients: bool = False
    ) -> None:
        super().__init__(f"{self.prefix}{message}")
        self.traceback = traceback
        """As the process printed it; empty when it died without a word."""
        self.is_mistake = is_mistake
        """The model's files or the options are at fault: only the user can mend it."""
        self.caused_by_clients = caused_by_clients
        """Clients brought it about, or may have, and can again as often as they like."""

    @property
    def report(self) -> str:
        """The message and, if there is one, the traceback."""
        return "\n".join(filter(None, (str(self), self.traceback)))


class WorkerLost(ProcessFailure):
    """A worker failed or died; this is the earliest failure of the group."""

    def __init__(
        self,
        rank: int,
        phase: str,
        message: str,
        at_s: float,
        traceback: str = "",
        is_mistake: bool = False,
        in_capture: bool = False,
    ) -> None:
        super().__init__(f"worker {rank} failed in phase {phase}: {message}", traceback, is_mistake)
        self.at_s = at_s
        """CLOCK_MONOTONIC of the failure."""
        self.in_capture = in_capture
        """A sum of NCCL in a CUDA graph did not end."""


class HostLost(WorkerLost):
    """The host of a worker is lost, or its launcher has ended it."""


class WorkersHung(ProcessFailure):
    """The workers live but do nothing."""


class GatewayLost(ProcessFailure):
    """The gateway process failed, died or got stuck."""

    prefix = "the gateway failed: "


class HttpLost(ProcessFailure):
    """The HTTP process failed or died."""

    prefix = "the HTTP process failed: "


class TooManyRestarts(ProcessFailure):
    """A process fails again and again: the service manager, or a person, must decide."""


class RestartLimit:
    """Allow ``most`` restarts of something within any ``window_s`` seconds."""

    def __init__(self, most: int, window_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        """Restarts since the beginning."""
        self.counted = 0
        """Those of them that the limit applies to."""
        self._most = most
        self._window_s = window_s
        self._clock_s = clock_s
        self._recent_s: deque[float] = deque()

    def note(self, cause: Exception, is_free: bool = False) -> None:
        """Count a restart that is about to be made. TooManyRestarts, with the cause, when it is one too many.

        ``is_free``: the limit does not apply. Otherwise clients who cause failures could end the server.
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
        self.counted += 1


class RestartPause:
    """Says how long to wait before a restart that no limit counts: nothing, then 0.5, 1, 2, 4 and at most 8 s.

    Clients give up after 15 s of silence, so the longest pause leaves them time to resume. Each quiet minute takes one
    step back.
    """

    FIRST_S, LONGEST_S, QUIET_S = 0.5, 8.0, 60.0
    MOST_STEPS = 5

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._steps = 0
        self._last_start_s = 0.0

    def next_s(self) -> float:
        """Return the pause before the restart that is about to be made, in seconds."""
        now_s = self._clock_s()
        quiet_minutes = int(max(0.0, now_s - self._last_start_s) / self.QUIET_S)
        self._steps = max(0, self._steps - quiet_minutes)
        pause_s = min(self.FIRST_S * 2 ** (self._steps - 1), self.LONGEST_S) if self._steps else 0.0
        self._steps = min(self._steps + 1, self.MOST_STEPS)
        self._last_start_s = now_s + pause_s
        return pause_s


def ending_of(cause: Exception, is_announced: bool) -> tuple[str, int]:
    """Log what ends the server; return the text for clients and systemd, and the exit status.

    The status of a user's mistake keeps the service manager from starting the server again as it is. Once the server
    ``is_announced``, nothing counts as such a mistake: what could be used once may be usable again.
    """
    if isinstance(cause, ProcessFailure):
        log.error("%s%s", cause.report, task_limit_hint() if _NO_THREAD in cause.report else "")
        return str(cause), UserError.exit_code if cause.is_mistake and not is_announced else 1
    if isinstance(cause, UserError):
        if is_announced:  # else the command prints it
            log.error("%s", cause)
        return str(cause), 1 if is_announced else cause.exit_code
    if isinstance(cause, ProcessStartError):
        log.error("%s", cause)
        return str(cause), 1
    text = f"internal error: {cause!r}"
    log.error("the server ends: %s", text, exc_info=cause)
    return text, 1
