"""Tell systemd how the server is doing, by the sd_notify protocol (systemd.service(5), sd_notify(3)).

systemd should wait only for work that advances. So the start-up deadline is extended while bytes move, the stop
deadline while tokens come, and the watchdog is fed while steps finish; systemd ends a server that hangs. Outside
systemd nothing is sent. Nothing here raises, and a manager that is gone or stuck holds up no step.
"""

import faulthandler
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, MutableMapping
from typing import Literal

from mgpu.protocol.internal.worker_messages import LoadProgress

log = logging.getLogger(__name__)

NOTIFY_INTERVAL_S = 5.0
"""Shortest time between two messages, unless the watchdog needs them sooner."""
EXTEND_S = 120.0
"""Time that each sign of progress asks for; the same as TimeoutStartSec in the unit."""
STALLED_S = 20.0
"""A step that takes longer is reported as stalled, unless the watchdog asks for a shorter time."""
IMPORTANT_WAIT_S = 2.0
"""How long the messages that change the service's state may wait for a full queue."""
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Sends one service's state to its manager. `loading` and `serving` are cheap: call them as often as you like."""

    def __init__(
        self, address: str = "", watchdog_s: float = 0.0, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Set the socket (a path, or ``@name`` in the abstract namespace; empty: send nothing) and the watchdog's time.

        ``clock_s`` is for tests.
        """
        self._address = address
        self._watchdog_s = watchdog_s
        self._stalled_s = watchdog_s / 3 or STALLED_S
        self._interval_s = min(NOTIFY_INTERVAL_S, self._stalled_s)
        self._clock_s = clock_s
        self._phase: Literal["starting", "ready", "stopping"] = "starting"
        self._title = ""
        self._status = ""
        self._last_said_s = -EXTEND_S
        self._seen: object = None
        self._moved_s = clock_s()
        self._moved = False
        self._complained = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> "Notifier":
        """Read the manager's variables and remove them from ``environ``: children must not speak for the service."""
        address, watchdog_us, watchdog_pid = (environ.pop(name, "") for name in VARIABLES)
        meant = watchdog_pid in ("", str(os.getpid())) and watchdog_us.isascii() and watchdog_us.isdigit()
        watchdog_s = int(watchdog_us) / 1e6 if meant else 0.0
        if address and watchdog_s:
            faulthandler.enable()  # the watchdog ends a process by SIGABRT: the journal then shows where it hung
        return cls(address, watchdog_s)

    # -- states --------------------------------------------------------------------------------------------------------

    def loading(self, progress: Iterable[LoadProgress], world_size: int) -> None:
        """Report how far the workers have loaded. Only a change since the last call counts as progress."""
        reports = sorted(progress, key=lambda each: each.rank)
        now_s = self._clock_s()
        seen = [(each.rank, each.phase, each.done_bytes) for each in reports]
        if seen != self._seen:
            self._seen, self._moved, self._moved_s = seen, True, now_s
        if self._is_due(now_s):
            self._say(now_s, loading_text(reports, world_size, now_s - self._moved_s), alive=self._moved)
            self._moved = False

    def ready(self, status: str) -> None:
        """Report that the server takes requests; ``status`` says which model it serves and where."""
        self._phase = "ready"
        self._title = status
        self._say(self._clock_s(), status, "READY=1", alive=True)

    def serving(self, running: int, waiting: int, waited_s: float) -> None:
        """Report the load. ``waited_s`` is how long the oldest step in flight has taken so far, 0 when there is none.

        After a third of the watchdog's time such a step no longer counts as a sign of life.
        """
        now_s = self._clock_s()
        if not self._is_due(now_s):
            return
        stalled = waited_s > self._stalled_s
        text = f"{self._title}: {running} running, {waiting} waiting"
        if stalled:
            text += f"; stalled, no step has finished for {waited_s:.0f} s"
        self._say(now_s, text, alive=not stalled)

    def recovering(self, waiting: int) -> None:
        """Report that the workers load again. The server itself limits how often and how long, not the manager."""
        now_s = self._clock_s()
        if self._is_due(now_s):
            self._say(now_s, f"{self._title}: recovering, {waiting} waiting", alive=True)

    def reloading(self, status: str) -> None:
        """Report that the configuration is read again; `reloaded` must follow. While stopping, report nothing."""
        if self._phase == "ready":
            usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._say(self._clock_s(), status, "RELOADING=1", f"MONOTONIC_USEC={usec}")

    def reloaded(self) -> None:
        """Report that the server has read its configuration again."""
        if self._phase == "ready":
            self.ready(self._title)

    def stopping(self, status: str) -> None:
        """Report that the server stops, or what it does next to stop; `serving` may follow while requests finish."""
        first = self._phase != "stopping"
        self._phase = "stopping"
        self._title = status
        self._say(self._clock_s(), status, *(("STOPPING=1",) if first else ()))

    # -- sending ---------------------------------------------------------------------------------------------------

    def _is_due(self, now_s: float) -> bool:
        return bool(self._address) and now_s - self._last_said_s >= self._interval_s

    def _say(self, now_s: float, status: str, *changes: str, alive: bool = False) -> None:
        """Send ``changes`` of state, the status if it is new, and if ``alive`` the sign of life of this phase."""
        self._last_said_s = now_s
        lines = list(changes)
        status = " ".join(status.split())
        if status != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        if alive and self._phase != "ready":
            lines.append(f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1e6:.0f}")
        elif alive and self._watchdog_s:
            lines.append("WATCHDOG=1")
        if lines and self._address:
            self._send("\n".join(lines), IMPORTANT_WAIT_S if changes else 0.0)

    def _send(self, text: str, wait_s: float) -> None:
        name = self._address.replace("@", "\0", 1) if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(wait_s)
                sender.connect(os.fsencode(name))
                sender.send(text.encode(errors="replace"))
        except (OSError, ValueError) as error:  # a manager that is gone must not disturb the clients
            if not self._complained:
                self._complained = True
                log.warning("the service manager cannot be told anything: %s", error)


def loading_text(progress: list[LoadProgress], world_size: int, still_s: float) -> str:
    """Return what the slowest ranks do: ``loading weights 41% (57.4 of 140.0 GB, 6.1 GB/s)``."""
    weights = [each for each in progress if each.phase == "weights"]
    done, total = sum(each.done_bytes for each in weights), sum(each.total_bytes for each in weights)
    if total:
        share = done / total * len(weights) / world_size  # ranks that have not begun count as empty
        elapsed_s = max(each.elapsed_s for each in weights)
        speed = f", {done / elapsed_s / 1e9:.1f} GB/s" if elapsed_s > 0 else ""
        text = f"loading weights {share:.0%} ({done / 1e9:.1f} of {total / 1e9:.1f} GB{speed})"
    else:
        phases = dict.fromkeys(each.phase for each in progress)
        text = f"starting {world_size} worker(s)" + (f": {', '.join(phases)}" if phases else "")
    return f"{text}; nothing has moved for {still_s:.0f} s" if still_s >= EXTEND_S / 4 else text
