"""The gateway process: start it, exchange link messages with it, notice its end or silence, replace it."""

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from typing import Any

import zmq

from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.processes.child_process import ChildProcess, count_memory_kills, describe_exit
from mgpu.orchestrator.processes.culprits import Culprits
from mgpu.orchestrator.processes.failures import GatewayLost, RestartLimit, RestartPause
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.internal.gateway_messages import (
    LINK,
    Alive,
    Cleared,
    EngineInfo,
    GatewayFailure,
    GatewayReady,
    GatewaySpec,
    Ping,
    Reload,
    ServerKeys,
    StateKnown,
)

log = logging.getLogger(__name__)

FRONT_NAME = "front.sock"
GENERATION_BITS = 40
"""Sequences that one gateway may number."""
OUTBOX_LIMIT = 100_000
"""Messages that may wait for the gateway; a turn of the engine sends few, so a gateway this far behind is stuck."""
DEATH_S = 0.2
"""The connection of a process that dies is gone a moment before the process is."""
DUMP_S = 0.2
"""What a gateway that hangs gets to write where it is; a stopped one cannot."""
FAREWELL_S = 0.5
"""Time that the gateway gets to read the last message before end of file tells it to leave."""
INPUT_SIGNALS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""A process brings these upon itself, and what it reads can make it do so."""
ASK_INTERVAL_S = 1.0
LONGEST_GAP_S = 2.0
"""Most that the time between two checks counts: a parent that was stopped itself has not listened meanwhile."""


class Watchdog:
    """Adds up how long one process has been silent, and says when to ask it for a sign of life: once a second."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.silent_s = 0.0
        """Without a sign of life, as of the last check."""
        self._clock_s = clock_s
        self._checked_s = self._asked_s = clock_s()

    def heard(self) -> None:
        """Note a sign of life."""
        self.silent_s = 0.0

    def check(self) -> bool:
        """Add the time since the last check to the silence; return whether to ask again."""
        now_s = self._clock_s()
        self.silent_s += min(now_s - self._checked_s, LONGEST_GAP_S)
        self._checked_s = now_s
        if now_s - self._asked_s < ASK_INTERVAL_S:
            return False
        self._asked_s = now_s
        return True


class GatewayProcess:
    """The gateway process and the socket to it; `replace` makes both anew, the process perhaps after a pause.

    Use it as a context manager; leaving it kills the process.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", runtime: RuntimeDir, config: ServerConfig) -> None:
        """Start the process. RuntimeDirError, OSError when it cannot be started."""
        self.endpoint = ""
        """Where clients connect, once the gateway is ready; a replacement binds the same endpoint."""
        self.is_ready = False
        self.known_state = ""
        """The engine's state that the gateway acts on, as it has said."""
        self.restarts = RestartLimit(config.restarts.max_restarts, config.restarts.restart_window_s)
        self._pause = RestartPause()
        self._culprits = Culprits()
        self._start_at_s: float | None = None
        """When the next process is to be started; None while there is one."""
        self._context = context
        self._runtime = runtime
        self._config = config
        self._info = EngineInfo("starting", config.limits.max_seq_len, 0, config.layout_table)
        """What the gateway must know of the engine now."""
        self._generation = 0
        self._unread: list[Any] = []
        self._has_logged_garbage = False
        self._reload: Reload | None = None
        """What has changed since the gateway got its spec, until it can be told."""
        self._last_sent_s = 0.0
        self._start_limit_s, self._answer_limit_s = config.timeouts.start_timeout_s, math.inf
        self._make_socket()
        self._start()

    def __enter__(self) -> "GatewayProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.socket.close(linger=0)
        self._culprits.close()

    def _make_socket(self) -> None:
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, OUTBOX_LIMIT)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # the gateway bounds what clients may queue

    def _start(self) -> None:
        self._start_at_s = None
        self.known_state, self._first_state = "", self._info.state if self._generation else ""
        self._memory_kills = count_memory_kills()
        self._culprits.begin()
        command = self._config.gateway_command
        self.process = ChildProcess("gateway", command, None, os.environ, (self._culprits.fd,))
        try:
            self.process.tell(LINK.encode(self._spec(self._bind_link())))
        except BaseException:
            self.process.kill()
            raise
        self._watchdog = Watchdog()

    def _bind_link(self) -> str:
        """Make the socket that only the process just started can connect to."""
        self.socket.setsockopt(zmq.IPC_FILTER_PID, self.process.pid)
        return self._runtime.bind(self.socket, f"link-{self._generation}")

    def _spec(self, link: str) -> GatewaySpec:
        runtime, config = self._runtime, self._config
        return GatewaySpec(
            runtime_dir=str(runtime.path),
            bind=self.endpoint or config.bind or runtime.ipc(FRONT_NAME),
            link=link,
            model_path=config.model.path,
            model_format=config.model.format,
            model_name=config.model_name,
            vocab_size=config.facts.vocab_size,
            eos_token_ids=list(config.facts.eos_token_ids),
            max_request_bytes=config.max_request_bytes,
            first_sequence=(self._generation << GENERATION_BITS) + 1,
            info=self._info if self._generation else None,
            keys=config.keys,
            own_key=b"" if config.own_pair is None else config.own_pair[0],
            limits=config.client_limits,
            memory_bytes=config.gateway_memory_bytes,
            sampling=config.sampling,
            tool_format=config.tool_format,
            reasoning_format=config.reasoning_format,
            sends_wake_up=config.spin_s > 0,
            prepares_text=True,
            logs_requests=config.logs_requests,
            record_fd=self._culprits.fd,
            shut_out=self._culprits.shut_out(),
            died_once=self._culprits.died_of(once=True),
            died_twice=self._culprits.died_of(once=False),
        )

    # -- messages ------------------------------------------------------------------------------------------------------

    def send(self, message: object) -> None:
        """Queue one message; a gateway that is not ready gets none. GatewayLost when it no longer reads."""
        if not self.is_ready:
            return
        self._last_sent_s = time.monotonic()
        try:
            self.socket.send(LINK.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.process.wait(time.monotonic() + DEATH_S)
            self.check_alive()
            self._unread.extend(self._receive_new(OUTBOX_LIMIT))  # one that ends has said why before its link closed
            raise self._stuck(f"it has left {OUTBOX_LIMIT} messages unread") from None

    def tell(self, info: EngineInfo) -> None:
        """Let the gateway know the engine's state and limits, now or as soon as it is ready."""
        self._info = info
        with contextlib.suppress(GatewayLost):  # whatever is sent next finds out too
            self.send(info)

    def reload(self, keys: ServerKeys | None, limits: ClientLimits) -> None:
        """Send this gateway, and those that replace it, another list of clients and other limits."""
        self._config = replace(self._config, keys=keys, client_limits=limits)
        self._reload = Reload(None if keys is None else keys.clients, limits)
        self._send_reload()

    def _send_reload(self) -> None:
        if self._reload is not None and self.is_ready:
            self.send(self._reload)
            self._reload = None

    def receive(self, limit: int) -> Iterator[Any]:
        """Yield up to ``limit`` messages that have come. GatewayLost when one of them reports a failure."""
        while self._unread:
            yield self._unread.pop(0)
        yield from self._receive_new(limit)

    def _receive_new(self, limit: int) -> Iterator[Any]:
        for _ in range(limit):
            try:
                message = LINK.decode(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except CodecError as error:  # need not come from the gateway: the socket's folder may have been opened
                if not self._has_logged_garbage:
                    self._has_logged_garbage = True
                    log.warning("ignored what is no message at the gateway's socket: %s", error)
                continue
            self._watchdog.heard()
            if isinstance(message, Alive):
                continue
            if isinstance(message, Cleared):
                self._culprits.clear(message.name)
                continue
            if isinstance(message, GatewayFailure):
                raise GatewayLost(message.message, message.traceback, message.is_mistake, message.caused_by_clients)
            if isinstance(message, GatewayReady):
                self.endpoint, self.is_ready, self.known_state = message.endpoint, True, self._first_state
                self._send_reload()
                self.send(self._info)
            if isinstance(message, StateKnown):
                self.known_state = message.state
            yield message

    # -- failure -------------------------------------------------------------------------------------------------------

    @property
    def processes(self) -> list[ChildProcess]:
        """The process to watch; none during a pause between two."""
        return [self.process] if self._start_at_s is None else []

    def notice_death(self, events: Container[object]) -> None:
        """Raise GatewayLost when the ``events`` of a poll say that the process has ended."""
        if any(process.pidfd in events for process in self.processes):
            self.check_alive()

    def check_alive(self) -> None:
        """Raise GatewayLost when the process has ended, with its last words if it left any."""
        status = self.process.exit_status()
        if status is None:
            return
        while self.socket.poll(20):
            self._unread.extend(self._receive_new(1))
        raise GatewayLost(f"the process {describe_exit(status)}", caused_by_clients=self._may_be_input(status))

    def _may_be_input(self, status: int) -> bool:
        """Return whether clients can have ended it. Before they can connect, the model's files are to blame."""
        if not self.endpoint and not self._culprits.had_clients():
            return False
        if -status == signal.SIGKILL:  # by the kernel's memory killer, or by a person
            return count_memory_kills() > self._memory_kills
        return -status in INPUT_SIGNALS

    def _stuck(self, message: str) -> GatewayLost:
        """Return the failure of a process that lives. Clients may have caused it unless somebody has stopped it."""
        return GatewayLost(message, caused_by_clients=bool(self.endpoint) and not self.process.is_stopped())

    def watch(self) -> None:
        """From now on the gateway must answer: start-up is over, which keeps the machine too busy to expect that."""
        self._start_limit_s = self._config.timeouts.gateway_start_timeout_s
        self._answer_limit_s = self._config.timeouts.gateway_timeout_s
        self._watchdog = Watchdog()

    def check_watchdog(self) -> None:
        """Raise GatewayLost when it is silent for too long, or takes too long to start. Call it at least every second.

        That costs a look at the clock; once a second the gateway is asked for a sign of life.
        """
        if self._start_at_s is not None:
            return
        if self._watchdog.check():
            self.send(Ping())
        limit_s = self._answer_limit_s if self.is_ready else self._start_limit_s
        if self._watchdog.silent_s <= limit_s or self.socket.poll(0):  # what it has said is read first
            return
        what = "did not answer" if self.is_ready else "was not ready"
        failure = self._stuck(f"it hangs: it {what} for {limit_s:g} s")
        self.process.send_signal(signal.SIGUSR1)  # where does it hang?
        self.process.wait(time.monotonic() + DUMP_S)
        raise failure

    def replace(self, failure: GatewayLost, info: EngineInfo) -> list[Any]:
        """End the process and return what it had still sent. Another one takes over the endpoint.

        TooManyRestarts when that happened too often. A failure that clients caused does not count; after the first
        such the next process has to wait: call `start_if_due`.
        """
        log.error("%s", failure.report)
        self.restarts.note(failure, is_free=failure.caused_by_clients)
        self.process.kill()
        with contextlib.suppress(GatewayLost):
            self._unread.extend(self._receive_new(OUTBOX_LIMIT))
        last_messages, self._unread = self._unread, []
        self.is_ready = False
        self._runtime.close_socket(self.socket)
        self._generation += 1
        self._info = info
        self._make_socket()
        pause_s = self._pause_after(failure)
        when = f" in {pause_s:g} s" if pause_s else ""
        log.warning("restart %d of the gateway%s", self.restarts.count, when)
        self._start_at_s = time.monotonic() + pause_s
        self.start_if_due()
        return last_messages

    def _pause_after(self, failure: GatewayLost) -> float:
        """Return how long the next process has to wait, and have the one who is to blame shut out."""
        if not failure.caused_by_clients:
            return 0.0
        blame = self._culprits.note_death()
        if blame is not None:
            log.warning("the gateway has died of input of %s, shut out for %g s", blame.owner, blame.seconds)
        return 0.0 if blame is not None and blame.is_known else self._pause.next_s()

    def pause_left_s(self) -> float:
        """Return how long the next process still has to wait; infinity while there is one."""
        return math.inf if self._start_at_s is None else max(0.0, self._start_at_s - time.monotonic())

    def start_if_due(self) -> bool:
        """Start the next process if its pause is over; return whether that was done. RuntimeDirError, OSError."""
        if self.pause_left_s() > 0.0:
            return False
        self._start()
        return True

    def stop(self, deadline_s: float) -> None:
        """Stop it by CLOCK_MONOTONIC ``deadline_s``.

        The gateway does not leave by itself: this waits half a second for it to read, then closes its input.
        """
        if not self.process.wait(min(self._last_sent_s + FAREWELL_S, deadline_s)):
            self.process.close_stdin()
            self.process.wait(deadline_s)
        self.process.kill()
