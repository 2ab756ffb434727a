"""The router's process as its parent sees it: start it, give it orders, read its reports, replace it."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from mgpu.orchestrator.processes.child_process import ChildProcess, ProcessStartError, describe_exit
from mgpu.orchestrator.processes.failures import RestartPause
from mgpu.orchestrator.router.copies import CopyFailed
from mgpu.protocol.internal.router_messages import ROUTER_LINK, RouterOrders, RouterReport, RouterSpec

ROUTER_COMMAND = (sys.executable, "-m", "mgpu.orchestrator.router")
SILENT_S = 15.0
"""Without a report for so long it counts as hung."""
_READ_BYTES = 1 << 20
_STACKS_S = 1.0

log = logging.getLogger(__name__)


class RouterProcess:
    """Use it as a context manager; leaving it kills the process."""

    def __init__(self, spec_for: Callable[[int], RouterSpec]) -> None:
        """``spec_for`` returns the spec for a descriptor to report to."""
        self._spec_for = spec_for
        self.report: RouterReport | None = None
        """The last; None before the first of each process."""
        self.restarts = 0
        self._orders = RouterOrders([])
        self._child: ChildProcess | None = None
        self._report_fd = -1
        self._received = b""
        self._heard_s = 0.0
        self._was_ready = False
        self._pause = RestartPause()
        self._start_at_s = 0.0

    def __enter__(self) -> "RouterProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    @property
    def fds(self) -> list[int]:
        """What becomes readable when it reports or ends."""
        return [] if self._child is None else [self._child.pidfd, self._report_fd]

    def order(self, orders: RouterOrders) -> None:
        """Tell it what has changed; the next process begins with it."""
        if replace(orders, number=self._orders.number) != self._orders:
            self._orders = replace(orders, number=self._orders.number + 1)
            if self._child is not None:
                self._child.tell(ROUTER_LINK.encode(self._orders))

    @property
    def is_up_to_date(self) -> bool:
        """True if the last report follows the last order."""
        return self.report is not None and self.report.number == self._orders.number

    def advance(self, now_s: float) -> None:
        """Start it when it is due, read its reports, replace it. CopyFailed if it has never been ready."""
        if self._child is None:
            if now_s >= self._start_at_s:
                self._start(now_s)
            return
        self._read(now_s)
        status = self._child.exit_status()
        if status is not None:
            self._replace(f"the router {describe_exit(status)}")
        elif now_s - self._heard_s > SILENT_S:
            self._child.send_signal(signal.SIGUSR1)
            self._child.wait(now_s + _STACKS_S)
            self._replace(f"the router has said nothing for {SILENT_S:g} s")

    def _start(self, now_s: float) -> None:
        self._report_fd, report_to = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            spec = ROUTER_LINK.encode(self._spec_for(report_to))
            self._child = ChildProcess("router", ROUTER_COMMAND, spec, os.environ, (report_to,))
            self._child.tell(ROUTER_LINK.encode(self._orders))
        except ProcessStartError as error:
            os.close(self._report_fd)
            if not self._was_ready:
                raise CopyFailed(str(error), 1) from error
            log.error("%s", error)
            self._start_at_s = now_s + RestartPause.LONGEST_S
            return
        finally:
            os.close(report_to)
        self._heard_s, self._received, self.report = now_s, b"", None

    def _read(self, now_s: float) -> None:
        with contextlib.suppress(BlockingIOError):
            self._received += os.read(self._report_fd, _READ_BYTES)
        while len(self._received) >= 4:
            end = 4 + int.from_bytes(self._received[:4], "little")
            if len(self._received) < end:
                return
            self.report = ROUTER_LINK.decode(self._received[4:end])
            self._received = self._received[end:]
            self._heard_s, self._was_ready = now_s, True

    def _replace(self, what: str) -> None:
        self._kill()
        if not self._was_ready:
            raise CopyFailed(f"{what} before it was ready", 1)
        self.restarts += 1
        pause_s = self._pause.next_s()
        log.error("%s; it is started again%s", what, f" in {pause_s:g} s" if pause_s else "")
        self._start_at_s = time.monotonic() + pause_s

    def stop(self, deadline_s: float) -> None:
        """Let it tell its clients that the server stops."""
        self.order(RouterOrders(self._orders.replicas, "stopped"))
        if self._child is not None:
            self._child.wait(deadline_s)
        self._kill()

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            os.close(self._report_fd)
            self._child = None
