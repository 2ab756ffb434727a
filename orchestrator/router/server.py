"""Everything that `serve --replicas` or `route` starts, from start to stop: the router, the copies, HTTP.

This process reads nothing that clients send: the router and HTTP are processes of their own, and are replaced.
"""

import itertools
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from types import FrameType

from mgpu import __version__
from mgpu.orchestrator.host.listening import HttpListener
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.host.signals import Signals
from mgpu.orchestrator.host.systemd import Notifier
from mgpu.orchestrator.processes.failures import HttpLost
from mgpu.orchestrator.processes.http_process import HttpProcess, front_keys_of
from mgpu.orchestrator.router.copies import Copy, CopyCommand, CopyFailed
from mgpu.orchestrator.router.roll import Roll
from mgpu.orchestrator.router.router_process import RouterProcess
from mgpu.protocol.discovery import COPY_FOLDER, RunningServer
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.internal.http_spec import HttpOptions
from mgpu.protocol.internal.router_messages import KnownReplica, RouterOrders, RouterReport, RouterSpec
from mgpu.protocol.keys import new_pair

ROLL_SIGNAL = signal.SIGUSR1
"""Asks for `Roll`."""
STOP_S = 15.0
"""What the copies get to end once no request is left."""
ROUTER_STOP_S = 2.0
LIST_INTERVAL_S = 2.0
SAY_AFTER_S, SAY_INTERVAL_S = 5.0, 60.0
"""When it is said that no server can be found, and how often."""
PERIOD_S = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """A front endpoint, and what is behind it."""

    bind: str = ""
    """Empty: an ipc socket in the private runtime directory."""
    keys: ServerKeys | None = None
    http: HttpOptions = field(default_factory=HttpOptions)
    drain_timeout_s: float = 30.0
    copies: tuple[CopyCommand, ...] = ()
    """Servers that are started here."""
    endpoints: Callable[[], list[str]] = list
    """Servers that run already; asked again every few seconds."""
    replica_keys: str | None = None
    """Key file for endpoints on tcp."""
    limits: ClientLimits | None = None
    """Of the whole server; None: each replica has its own."""


class RouterServer:
    """Runs until a signal. Leaving `run` ends every process and removes every file."""

    def __init__(self, config: RouterConfig, notifier: Notifier, listener: HttpListener | None) -> None:
        self._config = config
        self._notifier = notifier
        self._listener = listener
        self._own_pair = new_pair() if config.keys is not None and listener is not None else None
        self._copies: list[Copy] = []
        self._listed: dict[str, KnownReplica] = {}
        """Endpoints that have been named, also those that no longer are."""
        self._list_at_s = 0.0
        self._say_at_s = time.monotonic() + SAY_AFTER_S
        self._roll_asked = False
        self._is_announced = False
        self._state = ""

    def run(self) -> int:
        """Serve; return minus the number of the signal that ended it. UserError if it cannot start."""
        config = self._config
        with (
            Signals() as signals,
            RuntimeDir() as folder,
            RouterProcess(lambda fd: self._spec(folder, fd)) as router,
            HttpProcess(self._listener, config.http, front_keys_of(config.keys, self._own_pair)) as http,
        ):
            signal.signal(ROLL_SIGNAL, self._ask_for_roll)
            self._copies = [
                Copy(f"replica{at}", command, folder.path / f"{COPY_FOLDER}{at}")
                for at, command in enumerate(config.copies)
            ]
            try:
                self._serve(signals, folder, router, http)
                router.stop(time.monotonic() + ROUTER_STOP_S)
                http.stop()
                _stop(self._copies)
            finally:
                for copy in self._copies:
                    copy.kill()
            return -signals.received[0]

    def _spec(self, folder: RuntimeDir, report_fd: int) -> RouterSpec:
        own_key = b"" if self._own_pair is None else self._own_pair[0]
        bind = self._config.bind or folder.ipc("front.sock")
        return RouterSpec(
            bind, self._config.keys, own_key, self._config.replica_keys or "", report_fd, self._config.limits
        )

    def _serve(self, signals: Signals, folder: RuntimeDir, router: RouterProcess, http: HttpProcess) -> None:
        """Look after everything until the time to stop has come."""
        roll, stop_at_s = Roll(self._copies, self._config.drain_timeout_s), 0.0
        while True:
            ready = _wait([signals.fd, *router.fds, *http.fds, *(fd for copy in self._copies for fd in copy.fds)])
            now_s = time.monotonic()
            signals.clear()
            for copy in self._copies:
                copy.advance(now_s)
            if self._roll_asked:
                self._roll_asked = False
                roll.begin()
            roll.advance(now_s)
            router.order(self._orders(roll, router, now_s))
            router.advance(now_s)
            self._take_report(router)
            self._look_after_http(http, router, ready)
            folder.restore_if_removed()
            self._announce(router, folder, http)
            left = 0 if router.report is None else router.report.requests
            if signals.received and not stop_at_s:
                stop_at_s = now_s + (self._config.drain_timeout_s if self._is_announced else 0.0)
                self._state = "draining"
                self._notifier.stopping(f"{left} requests are left")
                log.info("%s: %d requests are left", signal.Signals(signals.received[0]).name, left)
                continue  # the router must know before its number of requests counts
            if stop_at_s and (self._is_drained(router) or now_s >= stop_at_s or len(signals.received) > 1):
                return

    def _is_drained(self, router: RouterProcess) -> bool:
        return router.report is not None and router.is_up_to_date and not router.report.requests

    def _orders(self, roll: Roll, router: RouterProcess, now_s: float) -> RouterOrders:
        rolling = {
            "copies_started_again": float(roll.done),
            "copies_rolling": float(roll.is_going_on),
            "copies_restarts": float(sum(copy.restarts for copy in self._copies)),
        }
        counters = {"router_restarts": float(router.restarts), **(rolling if self._copies else {})}
        if self._config.copies:
            known = [KnownReplica(copy.name, copy.endpoint, copy.is_held) for copy in self._copies]
            return RouterOrders(known, self._state, counters)
        if now_s >= self._list_at_s:
            self._list_at_s = now_s + LIST_INTERVAL_S
            self._read_list(router)
        return RouterOrders(list(self._listed.values()), self._state, counters)

    def _read_list(self, router: RouterProcess) -> None:
        """Take in which servers there are. One that is named no longer goes once it has no requests."""
        wanted = self._config.endpoints()
        busy = {each.name for each in router.report.replicas if each.requests} if router.report is not None else set()
        for endpoint, known in list(self._listed.items()):
            self._listed[endpoint] = KnownReplica(known.name, endpoint, endpoint not in wanted)
            if known.is_held and endpoint not in wanted and router.is_up_to_date and known.name not in busy:
                log.info("%s, %s, is named no longer and has no requests left", known.name, endpoint)
                del self._listed[endpoint]
        names = {known.name for known in self._listed.values()}
        free = (name for at in itertools.count() if (name := f"replica{at}") not in names)
        for endpoint in wanted:
            if endpoint not in self._listed:
                self._listed[endpoint] = KnownReplica(next(free), endpoint)
                log.info("%s is %s", self._listed[endpoint].name, endpoint)

    def _take_report(self, router: RouterProcess) -> None:
        if router.report is None:
            return
        reports = {each.name: each for each in router.report.replicas}
        for copy in self._copies:
            copy.report = reports.get(copy.name, copy.report)
        if self._is_announced:
            self._notifier.serving(router.report.requests, 0, 0.0)

    def _look_after_http(self, http: HttpProcess, router: RouterProcess, ready: Container[object]) -> None:
        try:
            if router.report is not None:
                http.start_if_due(router.report.endpoint)
            http.notice(ready)
        except HttpLost as failure:
            try:
                http.replace(failure)
            except HttpLost:  # it was never ready
                raise CopyFailed(failure.report, 1) from failure

    def _announce(self, router: RouterProcess, folder: RuntimeDir, http: HttpProcess) -> None:
        """Let clients find the server once all copies, or the first of other servers, take requests."""
        report = router.report
        if self._is_announced or report is None:
            return
        able = [each for each in report.replicas if each.state == "ready" and not each.problem]
        if len(able) < (len(self._copies) or 1):
            self._say_what_is_missing(report)
            return
        if not http.is_ready:
            return
        self._is_announced = True
        folder.announce(RunningServer(report.endpoint, os.getpid(), report.model, __version__, http.url))
        self._notifier.ready(f"{report.model} on {len(able)} replicas")
        log.info("ready: %s on %d replicas", report.model, len(able))
        log.info("listening on %s%s", report.endpoint, f", HTTP on {http.url}" if http.url else "")

    def _say_what_is_missing(self, report: RouterReport) -> None:
        """Log now and then why clients cannot find a router whose servers are all missing."""
        if self._copies or time.monotonic() < self._say_at_s:
            return
        self._say_at_s = time.monotonic() + SAY_INTERVAL_S
        endpoints = {known.name: endpoint for endpoint, known in self._listed.items()}
        states = [
            f"{each.name}, {endpoints.get(each.name, 'which is named no longer')}: {each.problem or each.state}"
            for each in report.replicas
        ]
        log.warning(
            "none of %d servers takes requests; waiting for the first (%s). Start one with: mgpu-launch serve MODEL "
            "--bind ENDPOINT, or name others with --replica or in --replica-file",
            len(states),
            "; ".join(states) or "no name has an address yet",
        )

    def _ask_for_roll(self, _number: int, _frame: FrameType | None) -> None:
        self._roll_asked = True


def _wait(fds: Sequence[int]) -> list[int]:
    """Return the descriptors that are readable, after a tenth of a second at the latest."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(PERIOD_S * 1000)]


def _stop(copies: Sequence[Copy]) -> None:
    """End all copies together, in good order if they do so in time."""
    for copy in copies:
        copy.begin_to_stop()
    deadline_s = time.monotonic() + STOP_S
    for copy in copies:
        copy.wait(deadline_s)
