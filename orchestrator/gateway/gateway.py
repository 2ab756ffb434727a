"""The gateway's loop: clients on one side, the engine on the other, text in between.

One turn of the loop waits until something is ready or the clock is due, and then, in this order:

    client's message    if one is waiting, wake an idle engine before it is read
    parent              if its descriptors are readable it is gone, and this turn is the last
    connections         answer all handshakes that wait, end connections that are too many
    threads             take all results: the loaded tokenizer, prompts encoded by other processes; begin those prompts
                        whose pause is over
    engine              handle up to 8 messages, answer questions for 2 ms, ask for those that wait
    clients             send what slow readers now take, handle messages in turns by account for 4 ms, during a pause
                        that the pace asks for only those of modest owners, drop lost connections (`clients.py`)
    clock               every 0.25 s: keepalives, deadlines, memory, a removed socket file

What a request goes through is in `requests/request_handler.py`.
"""

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import zmq

from mgpu.orchestrator.gateway.clients import Clients
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.front.socket import FrontSocket, Received
from mgpu.orchestrator.gateway.memory_limit import MemoryFull, MemoryLimit
from mgpu.orchestrator.gateway.requests.admission import ServedModel
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.orchestrator.gateway.requests.prompts import Prompts
from mgpu.orchestrator.gateway.requests.queries import Queries
from mgpu.orchestrator.gateway.requests.quota import Quota
from mgpu.orchestrator.gateway.requests.request_handler import RequestHandler
from mgpu.orchestrator.gateway.requests.resume import Resumptions
from mgpu.orchestrator.gateway.requests.table import RequestTable
from mgpu.orchestrator.gateway.suspects import Suspects
from mgpu.orchestrator.gateway.text.processes.background import BackgroundTasks
from mgpu.orchestrator.gateway.text.processes.encoder_process import EncoderProcesses
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec, load_codec
from mgpu.protocol.internal.gateway_messages import (
    ALIVE_INTERVAL_S,
    LINK,
    Alive,
    EngineInfo,
    GatewayReady,
    GatewaySpec,
    Outputs,
    RecordReply,
    Reload,
    StateKnown,
    StatsReply,
    WakeUp,
)

PERIOD_S = 0.25
BACKLOG_RETRY_S = 0.02
MANY_HANDSHAKES = 32
"""At the same time; fewer cannot fill the memory."""
STEPS_PER_TURN = 8
"""Messages of the engine handled before clients are looked at."""

log = logging.getLogger(__name__)


class Gateway:
    """Owns all state of the process; one thread. ``run`` returns after ``stop`` or when the parent is gone."""

    def __init__(
        self,
        spec: GatewaySpec,
        link: "zmq.Socket[Any]",
        front: FrontSocket,
        background: BackgroundTasks,
        parent_fds: Sequence[int],
    ) -> None:
        """``parent_fds`` become readable when the parent is gone. `run` closes ``front`` and ``background``."""
        self._spec = spec
        self._link = link
        self._front = front
        self._background = background
        self._parent_fds = tuple(parent_fds)
        self._model = ServedModel(spec, spec.info)
        self._quota = Quota(spec.limits)
        self._table = RequestTable(self._quota)
        self._outgoing = Outgoing(front, link)
        self._suspects = Suspects(spec, self._outgoing)
        self._requests = RequestHandler(self._model, self._table, self._outgoing)
        self._encoders = EncoderProcesses(spec.model_path, spec.model_format, spec.vocab_size)
        self._prompts = Prompts(self._requests, background, self._encoders, spec.vocab_size)
        self._queries = Queries(
            self._model, self._table, self._outgoing, self._requests.times, front.connections.count_for
        )
        turns: FairTurns[Received] = FairTurns()
        self._resumptions = Resumptions(self._requests, front.access, self._outgoing, turns)
        self._clients = Clients(
            front,
            turns,
            self._requests,
            self._model,
            self._prompts,
            self._queries,
            self._resumptions,
            self._outgoing,
            self._suspects,
        )
        self._memory = MemoryLimit(spec.memory_bytes)
        for owner, seconds in spec.shut_out.items():
            front.access.shut_out.add(owner, seconds)
        front.connections.max_of_key = spec.limits.max_client_connections
        self._next_period_s = self._next_alive_s = 0.0
        self._has_sent_wake_up = False
        """True from a `WakeUp` until the engine next sends anything."""
        self._running = True
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Load the tokenizer, say `GatewayReady`, then serve. Raises what made loading fail, and MemoryFull."""
        poller, paused = self._poller(), self._poller()
        poller.register(self._front.socket, zmq.POLLIN)
        if not self._model.is_loaded:
            self._background.run(lambda: load_codec(self._spec.model_path, self._spec.model_format), self._on_loaded)
        while self._running:
            ready = dict((paused if self._clients.wait_s() else poller).poll(self._wait_ms()))
            if self._front.socket in ready:
                self._send_wake_up()
            if not ready.keys().isdisjoint(self._parent_fds):
                self.stop()
            self._front.admit()
            self._background.deliver_results()
            self._prompts.begin_paused()
            self._read_link()
            self._front.send_batches()
            self._clients.charge(self._queries.advance())
            self._clients.serve()
            self._bound_handshakes()
            self._run_periodic_work()
            self._front.send_batches()
        self._requests.fail_all()
        self._front.flush()
        self._front.close()
        self._encoders.close()
        self._background.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Leave the loop after this turn."""
        self._running = False

    def serve_with(self, codec: TextCodec | None) -> None:
        """Take the model's tokenizer, None if it has none, and tell the engine that clients are served."""
        self._model.codec, self._model.is_loaded = codec, True
        self._memory.set_baseline()
        self._outgoing.to_engine(GatewayReady(self._front.endpoint))
        self._prepare_text()

    def _prepare_text(self) -> None:
        """Load the tokenizer for the processes of text once the server is ready: no first chat waits for it."""
        if self._spec.prepares_text and self._model.codec is not None and self._model.public_info.state == "ready":
            self._encoders.start()

    def _on_loaded(self, future: "Future[TextCodec | None]") -> None:
        self._failure = future.exception()
        if self._failure is not None:
            self.stop()
            return
        self.serve_with(future.result())

    def _poller(self) -> zmq.Poller:
        """Return a poller for all but the front socket."""
        poller = zmq.Poller()
        for socket in (self._link, self._front.access.socket, self._front.connections.monitor):
            poller.register(socket, zmq.POLLIN)
        for fd in (self._background.fd, *self._parent_fds):
            poller.register(fd, zmq.POLLIN)
        return poller

    def _wait_ms(self) -> int:
        wait_s = min(self._next_period_s - time.monotonic(), self._queries.wait_s(), self._prompts.wait_s())
        if self._front.has_backlog:
            wait_s = min(wait_s, BACKLOG_RETRY_S)
        if (pause_s := self._clients.wait_s()) or self._clients.has_messages:
            wait_s = min(wait_s, pause_s)
        return max(0, math.ceil(wait_s * 1000))

    # ---------------------------------------------------------------- engine

    def _read_link(self) -> None:
        for _ in range(STEPS_PER_TURN):
            try:
                data = self._link.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._send_alive()
            self._has_sent_wake_up = False
            message = LINK.decode(data)
            if isinstance(message, Outputs):
                self._requests.on_outputs(message)
            elif isinstance(message, EngineInfo):
                self._on_info(message)
            elif isinstance(message, Reload):
                self._on_reload(message)
            elif isinstance(message, StatsReply):
                self._queries.on_stats(message)
            elif isinstance(message, RecordReply):
                self._resumptions.on_record(message)

    def _send_alive(self) -> None:
        """Answer a `Ping`, and any other message, so that a gateway behind a long queue of steps does not seem hung."""
        if (now := time.monotonic()) >= self._next_alive_s:
            self._next_alive_s = now + ALIVE_INTERVAL_S
            self._outgoing.to_engine(Alive())

    def _send_wake_up(self) -> None:
        """Wake an idle engine while the message is still being read, once until it answers."""
        info = self._model.info
        is_idle = info is not None and info.state == "ready" and not len(self._table)
        if self._spec.sends_wake_up and is_idle and not self._has_sent_wake_up:
            self._has_sent_wake_up = True
            self._outgoing.to_engine(WakeUp())

    def _on_info(self, info: EngineInfo) -> None:
        self._model.info = info
        self._prepare_text()
        if info.state == "stopped":
            self._requests.fail_all()
        self._outgoing.to_engine(StateKnown(info.state))

    def _on_reload(self, reload: Reload) -> None:
        self._front.access.set_client_keys(reload.client_keys)
        self._quota.limits = reload.limits
        self._front.connections.max_of_key = reload.limits.max_client_connections
        for request in self._table:
            try:
                self._front.access.check(request.identity)
            except Refusal as refusal:
                self._requests.fail(request, refusal)

    # ----------------------------------------------------------------- clock

    def _bound_handshakes(self) -> None:
        """End slow handshakes while memory is tight: a peer without a key can fill it in less than a period."""
        if self._front.connections.num_unproven > MANY_HANDSHAKES and self._memory.is_tight(self._quota.limits):
            self._front.connections.end_slow_handshakes()

    def _check_memory(self) -> None:
        """Raise MemoryFull if the process has grown too much, and note who is to blame if that can be seen."""
        self._memory.release(self._quota.limits)
        try:
            self._memory.check(self._quota.limits)
        except MemoryFull:
            self._suspects.accuse(self._front.connections.flooding())
            raise

    def _run_periodic_work(self) -> None:
        """Check memory and the endpoint, keep clients informed that wait, and end what is over time."""
        now = time.monotonic()
        if now < self._next_period_s:
            return
        self._next_period_s = now + PERIOD_S
        self._check_memory()
        self._front.restore_endpoint()
        self._requests.run_periodic_work(now)
        self._queries.give_up_overdue(now)
        self._resumptions.give_up_overdue(now)
        self._resumptions.drop_orphans(now)
        self._clients.tell_floods()
        self._clients.drop_lost()
