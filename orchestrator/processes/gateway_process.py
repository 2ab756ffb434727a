"""The orchestrator's end of the gateway: start the process, exchange link messages, notice its end."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import zmq

from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.processes.child_process import ChildProcess, describe_exit
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.internal.gateway_messages import (
    LINK,
    Alive,
    EngineInfo,
    GatewayFailure,
    GatewayReady,
    GatewaySpec,
    Ping,
    Reload,
    ServerKeys,
    StateKnown,
)

FRONT_NAME = "front.sock"
GENERATION_BITS = 40
"""Sequences that one gateway may number."""
OUTBOX_LIMIT = 100_000
"""Messages that may wait for the gateway; one is sent per step, so a gateway this far behind is stuck."""
DEATH_S = 0.2
"""The connection of a process that dies is gone a moment before the process is."""
DUMP_S = 0.2
"""What a gateway that hangs gets to write where it is; a stopped one cannot."""
FAREWELL_S = 0.5
"""Time that the gateway gets to read the last message before end of file tells it to leave."""
ASK_INTERVAL_S = 1.0
LONGEST_GAP_S = 2.0
"""Most that the time between two checks counts: a parent that was stopped itself has not listened meanwhile."""


class GatewayLost(Exception):
    """The gateway process failed, died or got stuck."""

    def __init__(
        self, message: str, traceback: str = "", caused_by_clients: bool = False, is_mistake: bool = False
    ) -> None:
        """``caused_by_clients``: they brought it about, and can again as often as they like.

        ``is_mistake``: the user can mend it, and only the user.
        """
        super().__init__(f"the gateway failed: {message}")
        self.traceback = traceback
        self.caused_by_clients = caused_by_clients
        self.is_mistake = is_mistake


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
    """The gateway process and the socket to it, from construction to `stop`; `restart` replaces both."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", runtime: RuntimeDir, config: ServerConfig) -> None:
        self.endpoint = ""
        """Where clients connect, once the gateway is ready; another process serves the same."""
        self.is_ready = False
        self.known_state = ""
        """The engine's state that the gateway acts on, as it has said."""
        self._context = context
        self._runtime = runtime
        self._config = config
        self._generation = 0
        self._unread: list[Any] = []
        self._reload: Reload | None = None
        """What has changed since the gateway got its spec, until it can be told."""
        self._last_sent_s = 0.0
        self._start(None)

    def _start(self, info: EngineInfo | None) -> None:
        runtime, config = self._runtime, self._config
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, OUTBOX_LIMIT)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # the gateway bounds what clients may queue
        link = runtime.bind(self.socket, f"link-{self._generation}")
        spec = GatewaySpec(
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
            info=info,
            keys=config.keys,
            limits=config.client_limits,
            memory_bytes=config.gateway_memory_bytes,
            sends_wake_up=config.spin_s > 0,
        )
        self.known_state, self._first_state = "", "" if info is None else info.state
        self.process = ChildProcess("gateway", config.gateway_command, LINK.encode(spec), os.environ)
        self._watchdog = Watchdog()

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
            raise GatewayLost(f"it has left {OUTBOX_LIMIT} messages unread") from None

    def reload(self, keys: ServerKeys | None, limits: ClientLimits) -> None:
        """Give this gateway, and those that replace it, another list of clients and other limits."""
        self._config = replace(self._config, keys=keys, client_limits=limits)
        self._reload = Reload(None if keys is None else keys.clients, limits)
        self._tell_reload()

    def _tell_reload(self) -> None:
        if self._reload is not None and self.is_ready:
            self.send(self._reload)
            self._reload = None

    def receive(self, limit: int) -> Iterator[Any]:
        """Give up to ``limit`` messages that are there. GatewayLost when one of them reports a failure."""
        while self._unread:
            yield self._unread.pop(0)
        yield from self._receive_new(limit)

    def _receive_new(self, limit: int) -> Iterator[Any]:
        for _ in range(limit):
            try:
                message = LINK.decode(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except CodecError as error:
                raise GatewayLost(f"it sent what is no message: {error}") from error
            self._watchdog.heard()
            if isinstance(message, Alive):
                continue
            if isinstance(message, GatewayFailure):
                raise GatewayLost(message.message, message.traceback, message.caused_by_clients, message.is_mistake)
            if isinstance(message, GatewayReady):
                self.endpoint, self.is_ready, self.known_state = message.endpoint, True, self._first_state
                self._tell_reload()
            if isinstance(message, StateKnown):
                self.known_state = message.state
            yield message

    def check_alive(self) -> None:
        """GatewayLost when the process has ended, with its last words if it left any."""
        status = self.process.exit_status()
        if status is None:
            return
        while self.socket.poll(20):
            self._unread.extend(self._receive_new(1))
        raise GatewayLost(f"the process {describe_exit(status)}")

    def check_watchdog(self) -> None:
        """GatewayLost when it has been silent for too long, or takes too long to start. Call it at least every second.

        That costs a look at the clock; once a second the gateway is asked for a sign of life.
        """
        if self._watchdog.check():
            self.send(Ping())
        config = self._config
        limit_s = config.timeouts.gateway_timeout_s if self.is_ready else config.timeouts.gateway_start_timeout_s
        if self._watchdog.silent_s <= limit_s or self.socket.poll(0):  # what it has said is read first
            return
        self.process.send_signal(signal.SIGUSR1)  # where does it hang?
        self.process.wait(time.monotonic() + DUMP_S)
        what = "did not answer" if self.is_ready else "was not ready"
        raise GatewayLost(f"it hangs: it {what} for {limit_s:g} s")

    def restart(self, info: EngineInfo) -> list[Any]:
        """Replace the process by one that takes over its endpoint, and give what the old one had still sent."""
        self.process.reap()
        with contextlib.suppress(GatewayLost):
            self._unread.extend(self._receive_new(OUTBOX_LIMIT))
        last_messages, self._unread = self._unread, []
        self.is_ready = False
        self.socket.close(linger=0)
        self._generation += 1
        self._start(info)
        return last_messages

    def stop(self, deadline_s: float) -> None:
        """Let it read what was sent, end its input, kill it at CLOCK_MONOTONIC ``deadline_s``; reap it."""
        if not self.process.wait(min(self._last_sent_s + FAREWELL_S, deadline_s)):
            self.process.close_stdin()
            self.process.wait(deadline_s)
        self.process.reap()
        self.socket.close(linger=0)
