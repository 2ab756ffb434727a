"""The process of one rank that an outside launcher starts: it joins the orchestrator, and runs its worker.

It says who it is once a second, and does what the orchestrator answers: it starts a worker, or kills the one that runs.
So it stays through all epochs of the server. The worker is a process of its own, because a rank of a broken group can
only be killed: it waits for peers in a library. Whatever ends the agent ends the worker too (PR_SET_PDEATHSIG).

When it hears nothing of the orchestrator, it kills its worker after ``silence_s``, because by then the epoch has ended
without it. It goes on to call for ``join_timeout_s``: a link may come back, and a server may be started again.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.internal.host_messages import (
    HELLO_S,
    HOSTS,
    Hello,
    Leave,
    Orders,
    Refused,
    StartWorker,
    WorkerEnded,
    agent_identity,
)
from mgpu.protocol.internal.host_socket import use_host_options
from mgpu.protocol.keys import ClientKeys, fingerprint
from mgpu.worker.start.join.child import WORKER_COMMAND, Here, Worker, completed
from mgpu.worker.start.join.network import interface_for

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_CONFIG = 78
"""A mistake that only the user can mend, as of `mgpu-launch`."""
FIRST_SILENCE_S = 15.0
"""As `Orders.silence_s`, before the first orders."""
LINGER_MS = 1000
MOST_UNSENT = 4
"""Messages that wait for a connection. ZMQ_IMMEDIATE would let none wait, but it also drops the last words of an
orchestrator that has closed the connection."""
_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_CONNECTED


class Agent:
    """One rank's place in the group. `run` returns the exit status."""

    def __init__(
        self,
        hello: Hello,
        here: Here,
        keys: ClientKeys,
        endpoint: str,
        join_timeout_s: float,
        command: tuple[str, ...] = WORKER_COMMAND,
    ) -> None:
        """``command`` starts a worker."""
        self._command = command
        self._hello = hello
        self._here = here
        self._keys = keys
        self._endpoint = endpoint
        self._join_timeout_s = join_timeout_s
        self._silence_s = FIRST_SILENCE_S
        self._worker: Worker | None = None
        self._heard_s = time.monotonic()
        self._hello_due_s = 0.0
        self._has_joined = False
        self._is_lost = False
        self._connections = 0
        self._launcher = os.getppid()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, MOST_UNSENT)
        use_host_options(self._socket, agent_identity(hello.incarnation), keys)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._socket.connect(endpoint)

    def run(self) -> int:
        """Join, run workers, and return when the server has ended, refuses this rank, or is gone for too long."""
        log.info("joining %s as rank %d of %d", self._endpoint, self._hello.rank, self._hello.world_size)
        try:
            while True:
                self._say_hello()
                self._wait()
                for message in self._messages():
                    if (status := self._obey(message)) is not None:
                        return status
                self._watch_worker()
                if (status := self._watch_orchestrator()) is not None:
                    return status
        finally:
            self._end_worker()
            self._socket.disable_monitor()
            self._context.destroy(linger=LINGER_MS)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _say_hello(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._hello_due_s:
            self._hello_due_s = now_s + HELLO_S
            epoch = -1 if self._worker is None else self._worker.epoch
            self._send(replace(self._hello, epoch=epoch))

    def _send(self, message: object) -> None:
        with contextlib.suppress(zmq.Again):  # there is no connection, for seconds now
            self._socket.send(HOSTS.encode(message), zmq.NOBLOCK)

    def _wait(self) -> None:
        poller = zmq.Poller()
        sources: list[Any] = [self._socket, self._monitor, *([self._worker.pidfd] if self._worker else [])]
        for source in sources:
            poller.register(source, zmq.POLLIN)
        poller.poll(max(0, int((self._hello_due_s - time.monotonic()) * 1000)) + 1)

    def _messages(self) -> Iterator[object]:
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._heard_s = time.monotonic()
            try:
                yield HOSTS.decode(data)
            except CodecError as error:  # a server of another version
                yield Refused(f"{self._endpoint} does not answer as mgpu {self._hello.version} does: {error}")

    def _obey(self, message: object) -> int | None:
        """Do what the orchestrator asks; return the exit status if this ends the agent."""
        if isinstance(message, Orders):
            self._follow(message)
        elif isinstance(message, StartWorker):
            self._start(message)
        elif isinstance(message, Refused):
            log.error("%s", message.text)
            return EXIT_CONFIG
        elif isinstance(message, Leave):
            if message.text:
                log.error("the server has failed: %s", message.text)
                return EXIT_FAILED
            log.info("the server has stopped")
            return 0
        return None

    def _follow(self, orders: Orders) -> None:
        self._silence_s = orders.silence_s
        if self._is_lost or not self._has_joined:
            log.info("joined" if not self._has_joined else "joined again")
            self._has_joined, self._is_lost = True, False
        if self._worker is not None and self._worker.epoch != orders.epoch:
            self._end_worker(orders.wants_stacks)

    # -- the worker ----------------------------------------------------------------------------------------------------

    def _start(self, order: StartWorker) -> None:
        self._end_worker()
        spec = completed(order, self._hello.incarnation, self._keys, self._endpoint, self._here)
        interface = interface_for(order.master.rpartition(":")[0], host_of(self._endpoint))
        log.info("starting the worker of epoch %d as rank %d", spec.epoch, order.rank)
        try:
            self._worker = Worker(spec, self._here.environment(order, interface), self._command)
        except OSError as error:
            log.error("the worker cannot be started: %s", error)
            self._send(WorkerEnded(spec.epoch, EXIT_FAILED))

    def _watch_worker(self) -> None:
        """Report the end of the worker. The orchestrator decides what follows."""
        if self._worker is not None and self._worker.status() is not None:
            epoch = self._worker.epoch
            self._send(WorkerEnded(epoch, self._end_worker()))

    def _end_worker(self, wants_stacks: bool = False) -> int:
        worker, self._worker = self._worker, None
        return 0 if worker is None else worker.end(wants_stacks)

    # -- the orchestrator and the launcher -----------------------------------------------------------------------------

    def _watch_orchestrator(self) -> int | None:
        """Return an exit status if the orchestrator refuses the key or is gone for too long, or the launcher is."""
        if self._is_refused():
            key = fingerprint(self._keys.public)
            log.error(
                "%s refuses this host's key %s: it is not in workers/ of the server's keys. Make one there with "
                "`mgpu-launch keygen --worker NAME`, and start this with its --keys NAME.worker", self._endpoint, key
            )  # fmt: skip
            return EXIT_CONFIG
        if os.getppid() != self._launcher:
            log.error("the launcher that started this has ended")
            return EXIT_FAILED
        silent_s = time.monotonic() - self._heard_s
        if silent_s > self._silence_s and not self._is_lost:
            self._is_lost = True
            log.warning("no answer from %s for %g s%s", self._endpoint, self._silence_s, self._what_now())
            self._end_worker()
        if silent_s <= self._join_timeout_s:
            return None
        log.error("no answer from %s for %g s (--join-timeout)%s", self._endpoint, silent_s, self._hint())
        return EXIT_FAILED

    def _what_now(self) -> str:
        ended = "" if self._worker is None else "; its worker ends, since the epoch has ended without it"
        return f"{ended}; calling for up to {self._join_timeout_s:g} s"

    def _is_refused(self) -> bool:
        refused = False
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            refused |= event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            self._connections += event["event"] == zmq.EVENT_CONNECTED
        return refused

    def _hint(self) -> str:
        """Return what is probably wrong, and what to do."""
        if self._has_joined:
            return ": it has ended, or the link is cut"
        if self._connections:
            server = fingerprint(self._keys.server)
            return (
                f": something accepts connections there, but it is no server with the key {server}, which is the one "
                "in this host's key file. Is it the address of --join of `mgpu-launch serve`, and are the keys its?"
            )
        return (
            ": nothing accepts connections there. Is `mgpu-launch serve --nodes N --join …` running, and its port open?"
        )


def host_of(endpoint: str) -> str:
    """Return the host of ``tcp://HOST:PORT``."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
