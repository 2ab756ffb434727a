"""Everything that one router starts, from start to stop: signals, folder, front socket, copies, HTTP."""

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

import zmq

from mgpu import __version__
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.host.listening import HttpListener
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.host.signals import Signals
from mgpu.orchestrator.host.systemd import Notifier
from mgpu.orchestrator.processes.failures import HttpLost
from mgpu.orchestrator.processes.http_process import HttpProcess, front_keys_of
from mgpu.orchestrator.router.copies import Copy, CopyCommand
from mgpu.orchestrator.router.replica import Replica
from mgpu.orchestrator.router.roll import Roll
from mgpu.orchestrator.router.router import PERIOD_S, Router
from mgpu.protocol.discovery import COPY_FOLDER, RunningServer
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.internal.http_spec import HttpOptions
from mgpu.protocol.keys import new_pair

ROLL_SIGNAL = signal.SIGUSR1
"""Asks for `Roll`."""
STOP_S = 15.0
"""What the copies get to end once no request is left."""
CONNECT_S = 3.0
"""How long a router waits for the replicas that live before it takes clients: one that was replaced finds them all."""
MAX_REQUEST_BYTES = 1 << 20

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
    """Servers that the router starts itself."""
    endpoints: Callable[[], list[str]] = list
    """Servers that run already; asked again every few seconds."""
    replica_keys: str | None = None
    """Key file for endpoints on tcp."""


class RouterServer:
    """Runs until a signal. Leaving `run` ends every process and removes every file."""

    def __init__(self, config: RouterConfig, notifier: Notifier, listener: HttpListener | None) -> None:
        self._config = config
        self._notifier = notifier
        self._listener = listener
        self._own_pair = new_pair() if config.keys is not None and listener is not None else None
        self._replicas = [Replica(f"replica{at}") for at in range(len(config.copies))]
        self._by_endpoint: dict[str, Replica] = {}
        self._roll_asked = False
        self._is_announced = False
        self._endpoints_due_s = 0.0

    def run(self) -> int:
        """Serve; return minus the number of the signal that ended it. UserError if it cannot start."""
        config = self._config
        with (
            Signals() as signals,
            zmq.Context() as context,
            RuntimeDir() as folder,
            HttpProcess(self._listener, config.http, front_keys_of(config.keys, self._own_pair)) as http,
        ):
            signal.signal(ROLL_SIGNAL, self._ask_for_roll)
            copies = [
                Copy(replica, command, folder.path / f"{COPY_FOLDER}{at}")
                for at, (replica, command) in enumerate(zip(self._replicas, config.copies, strict=True))
            ]
            self._connect_endpoints(time.monotonic())
            own_key = b"" if self._own_pair is None else self._own_pair[0]
            self._wait_for_replicas(signals)
            front = FrontSocket(
                context, config.bind or folder.ipc("front.sock"), MAX_REQUEST_BYTES, config.keys, own_key
            )
            router = Router(front, self._replicas, names_accounts=config.replica_keys is None)
            try:
                status = self._serve(
                    router, front, copies, Roll(copies, router.dispatch, config.drain_timeout_s), signals, folder, http
                )
            finally:
                for copy in copies:
                    copy.kill()
                for replica in self._replicas:
                    replica.disconnect()
                front.close()
            return status

    def _wait_for_replicas(self, signals: Signals) -> None:
        """Give servers that run already a moment to answer."""
        until_s = time.monotonic() + CONNECT_S
        while self._by_endpoint and time.monotonic() < until_s and not signals.received:
            for replica in self._replicas:
                replica.receive()
            if all(replica.is_connected for replica in self._replicas):
                return
            time.sleep(0.01)

    def _serve(
        self,
        router: Router,
        front: FrontSocket,
        copies: Sequence[Copy],
        roll: Roll,
        signals: Signals,
        folder: RuntimeDir,
        http: HttpProcess,
    ) -> int:
        stop_at_s = 0.0
        while True:
            fds = [signals.fd, *http.fds, *(fd for copy in copies for fd in copy.fds)]
            ready = router.turn(fds, min(PERIOD_S, http.pause_left_s()))
            now_s = time.monotonic()
            if signals.fd in ready:
                signals.clear()
            for copy in copies:
                copy.advance(now_s, router.dispatch)
            self._connect_endpoints(now_s)
            self._look_after_http(http, front.endpoint, ready)
            folder.restore_if_removed()
            self._announce(router, front, folder, http)
            if self._is_announced:
                self._notifier.serving(len(router.table), 0, 0.0)
            if self._roll_asked:
                self._roll_asked = False
                roll.begin()
            roll.advance(now_s)
            router.questions.own = {
                "copies_started_again": float(roll.done),
                "copies_rolling": float(roll.is_going_on),
                "copies_restarts": float(sum(copy.restarts for copy in copies)),
            }
            if signals.received and not stop_at_s:
                stop_at_s = now_s + (self._config.drain_timeout_s if self._is_announced else 0.0)
                router.questions.state = "draining"
                self._notifier.stopping(f"{len(router.table)} requests are left")
                log.info("%s: %d requests are left", signal.Signals(signals.received[0]).name, len(router.table))
            if stop_at_s and (not len(router.table) or now_s >= stop_at_s or len(signals.received) > 1):
                break
        router.stop("the server has stopped")
        router.turn(wait_s=0.0)
        http.stop()
        _stop(copies, router)
        return -signals.received[0]

    def _look_after_http(self, http: HttpProcess, endpoint: str, ready: Sequence[int]) -> None:
        http.start_if_due(endpoint)
        try:
            http.notice(ready)
        except HttpLost as failure:
            http.replace(failure)

    def _announce(self, router: Router, front: FrontSocket, folder: RuntimeDir, http: HttpProcess) -> None:
        """Let clients find the server once all copies, or the first of other servers, take requests."""
        able = [each for each in self._replicas if each.takes_requests]
        wanted = len(self._config.copies) or 1
        if self._is_announced or len(able) < wanted or not http.is_ready or able[0].health is None:
            return
        self._is_announced = True
        model = able[0].health.model
        folder.announce(RunningServer(front.endpoint, os.getpid(), model, __version__, http.url))
        self._notifier.ready(f"{model} on {len(able)} replicas")
        log.info("ready: %s on %d replicas", model, len(able))
        log.info("listening on %s%s", front.endpoint, f", HTTP on {http.url}" if http.url else "")

    def _connect_endpoints(self, now_s: float) -> None:
        """Take in which servers there are, if that may change."""
        if self._config.copies or now_s < self._endpoints_due_s:
            return
        self._endpoints_due_s = now_s + 2.0
        wanted = self._config.endpoints()
        for endpoint in wanted:
            if endpoint not in self._by_endpoint:
                replica = Replica(f"replica{len(self._by_endpoint)}", self._config.replica_keys)
                replica.connect(endpoint)
                self._by_endpoint[endpoint] = replica
                self._replicas.append(replica)
                log.info("%s is %s", replica.name, endpoint)
            self._by_endpoint[endpoint].is_held = False
        for endpoint in self._by_endpoint.keys() - set(wanted):
            self._by_endpoint[endpoint].is_held = True

    def _ask_for_roll(self, _number: int, _frame: FrameType | None) -> None:
        self._roll_asked = True


def _stop(copies: Sequence[Copy], router: Router) -> None:
    """End all copies together, in good order if they do so in time."""
    for copy in copies:
        copy.begin_to_stop()
    deadline_s = time.monotonic() + STOP_S
    for copy in copies:
        copy.wait(deadline_s)
