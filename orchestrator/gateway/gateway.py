"""The gateway's loop: clients on one side, the engine on the other, text in between.

Life of a request: decoded and checked here (or refused), tokenized, admitted as one sequence per choice; then every
engine step brings tokens, which become text and go out; it ends in one `Finished` or `Failed`, whatever happens.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import zmq

from mgpu.orchestrator.gateway.front.identity import check_allowed, owned
from mgpu.orchestrator.gateway.front.socket import Front, Received, id_of
from mgpu.orchestrator.gateway.memory_limit import MemoryBound
from mgpu.orchestrator.gateway.requests.admission import Refusal, admit, check_model, check_state
from mgpu.orchestrator.gateway.requests.prompts import Prompts
from mgpu.orchestrator.gateway.requests.queries import Queries
from mgpu.orchestrator.gateway.requests.quota import Quota, client_number, owner_of, size_of
from mgpu.orchestrator.gateway.requests.resume import Resumption, pack_context
from mgpu.orchestrator.gateway.requests.table import ChoiceState, Request, RequestTable
from mgpu.orchestrator.gateway.text.background import Jobs
from mgpu.orchestrator.gateway.text.chat_template import ChatTemplateError
from mgpu.orchestrator.gateway.text.detokenizer import Detokenizer
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec, load_codec
from mgpu.protocol.front.client_messages import CancelRequest, Generate, ResumeRequest, parse_client_message
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.framing import WireError
from mgpu.protocol.front.server_messages import Failed, Keepalive, ServerMessage, to_map
from mgpu.protocol.internal.gateway_messages import (
    ALIVE_INTERVAL_S,
    LINK,
    Alive,
    Cancel,
    EngineInfo,
    GatewayReady,
    GatewaySpec,
    Outputs,
    Reload,
    Resumable,
    Resume,
    Resumed,
    StateKnown,
    StatsQuery,
    StatsReply,
    Submit,
    WakeUp,
)

TICK_S = 0.25
KEEPALIVE_S = 1.0
BACKLOG_RETRY_MS = 20
STEPS_PER_TURN = 8
MESSAGES_PER_TURN = 64
"""Engine steps, and client messages, handled before the other side is looked at again: neither may starve the other."""

log = logging.getLogger(__name__)


class Gateway:
    """Owns all state of the process; one thread. ``run`` returns after ``stop`` or when the parent is gone."""

    def __init__(
        self, spec: GatewaySpec, link: "zmq.Socket[Any]", front: Front, jobs: Jobs, parent_fds: Sequence[int]
    ) -> None:
        """``parent_fds`` become readable when the parent is gone. ``front`` and ``jobs`` are closed at the end."""
        self._spec = spec
        self._link = link
        self._front = front
        self._jobs = jobs
        self._parent_fds = tuple(parent_fds)
        self._codec: TextCodec | None = None
        self._is_loaded = False
        self._info = spec.info
        self._quota = Quota(spec.limits)
        self._table = RequestTable(self._quota)
        self._prompts = Prompts(self._table, jobs, self._admit, self._refuse)
        self._next_sequence = spec.first_sequence
        self._queries = Queries(spec, self._table, self._send, self._send_engine)
        self._resumption = Resumption(
            self._table,
            self._queries,
            self._choice,
            self._send,
            self._send_engine,
            lambda identity: check_allowed(identity, front.doorkeeper),
            self._cancel,
        )
        self._memory = MemoryBound(spec.memory_bytes)
        self._next_tick_s = self._next_alive_s = 0.0
        self._has_sent_wake_up = False
        """Since the engine was last heard; it says something at least every second."""
        self._running = True
        self._failure: BaseException | None = None

    # ------------------------------------------------------------------ loop

    def run(self) -> None:
        """Load the tokenizer, say `GatewayReady`, then serve. Raises what made loading fail, and MemoryFull."""
        poller = zmq.Poller()
        for socket in (self._link, self._front.socket, self._front.doorkeeper.socket):
            poller.register(socket, zmq.POLLIN)
        for fd in (self._jobs.fd, *self._parent_fds):
            poller.register(fd, zmq.POLLIN)
        if not self._is_loaded:
            self._jobs.start(lambda: codec_of(self._spec), self._loaded)
        while self._running:
            ready = dict(poller.poll(self._wait_ms()))
            if self._front.socket in ready:
                self._send_wake_up()
            if not ready.keys().isdisjoint(self._parent_fds):
                self.stop()
            self._front.doorkeeper.answer()
            self._jobs.finish()
            self._read_link()
            self._read_front()
            self._tick()
        self._close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Leave the loop after this turn."""
        self._running = False

    @property
    def _usable_info(self) -> EngineInfo | None:
        """The engine's state, once the tokenizer is there too."""
        return self._info if self._is_loaded else None

    def _wait_ms(self) -> int:
        if self._front.has_backlog:
            return BACKLOG_RETRY_MS
        return max(0, int((self._next_tick_s - time.monotonic()) * 1000) + 1)

    def _loaded(self, future: "Future[TextCodec | None]") -> None:
        self._failure = future.exception()
        if self._failure is not None:
            self.stop()
            return
        self.use(future.result())

    def use(self, codec: TextCodec | None) -> None:
        """Take the model's tokenizer, None when it has none, and tell the engine that clients are served."""
        self._codec, self._is_loaded = codec, True
        self._memory.settle()
        self._link.send(LINK.encode(GatewayReady(self._front.endpoint)))

    def _close(self) -> None:
        self._fail_all()
        self._front.flush()
        self._front.close()
        self._jobs.close()

    # ---------------------------------------------------------------- engine

    def _read_link(self) -> None:
        for _ in range(STEPS_PER_TURN):
            try:
                data = self._link.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._say_alive()
            self._has_sent_wake_up = False
            message = LINK.decode(data)
            if isinstance(message, Outputs):
                self._on_outputs(message)
            elif isinstance(message, EngineInfo):
                self._on_info(message)
            elif isinstance(message, Reload):
                self._on_reload(message)
            elif isinstance(message, StatsReply):
                self._queries.on_stats(message, self._usable_info)
            elif isinstance(message, Resumed):
                self._resumption.on_record(message)

    def _say_alive(self) -> None:
        """Answer a `Ping`, and all else, so that a gateway behind a long queue of steps does not look as if it hung."""
        if (now := time.monotonic()) >= self._next_alive_s:
            self._next_alive_s = now + ALIVE_INTERVAL_S
            self._link.send(LINK.encode(Alive()))

    def _send_wake_up(self) -> None:
        """Wake an idle engine while the message is still being read; once is enough for one that does not answer."""
        is_idle = self._info is not None and self._info.state == "ready" and not len(self._table)
        if self._spec.sends_wake_up and is_idle and not self._has_sent_wake_up:
            self._has_sent_wake_up = True
            self._link.send(LINK.encode(WakeUp()))

    def _on_info(self, info: EngineInfo) -> None:
        self._info = info
        if info.state == "stopped":
            self._fail_all()
        self._link.send(LINK.encode(StateKnown(info.state)))

    def _on_reload(self, reload: Reload) -> None:
        self._front.doorkeeper.let_in(reload.client_keys)
        self._quota.limits = reload.limits
        for request in self._table:
            try:
                check_allowed(request.identity, self._front.doorkeeper)
            except Refusal as refusal:
                self._fail(request, refusal)

    def _on_outputs(self, outputs: Outputs) -> None:
        now = time.monotonic()
        for at, sequence_id in enumerate(outputs.sequence_ids):
            found = self._table.by_sequence(sequence_id)
            if outputs.finish[at]:
                self._quota.ended(sequence_id)
            elif found is None or not found[1].num_tokens:
                self._quota.begun(sequence_id)
            if found is None or found[1].is_behind:
                continue  # its request ended here while the engine was still at it, or catches up with the engine
            request, choice = found
            if choice.num_tokens == 0 and choice.index == 0:
                request.cached_tokens = outputs.cached_tokens[at]
            if outputs.finish[at] == "error":
                self._fail(request, Refusal("engine_error", outputs.errors[at] or "the engine failed"))
                continue
            choice.absorb(outputs.token_ids[at], outputs.logprobs[at] if outputs.logprobs else (), outputs.finish[at])
            self._after_step(request, choice, engine_goes_on=not outputs.finish[at], now=now)

    def _after_step(self, request: Request, choice: ChoiceState, engine_goes_on: bool, now: float) -> None:
        if choice.finish_reason is not None:
            self._table.end_choice(choice)
            if engine_goes_on:
                self._send_engine(Cancel(choice.sequence_id, "stop"))
        if request.wants_message(choice):
            request.last_sent_s = now
            self._send(request.client, choice.drain(request.id))
        if request.done:
            self._table.remove(request)
            self._send(request.client, request.finished())

    def _send_engine(self, message: Submit | Resumable | Resume | Cancel | StatsQuery) -> None:
        self._link.send(LINK.encode(message))

    # --------------------------------------------------------------- clients

    def _read_front(self) -> None:
        self._front.flush()
        for _ in range(MESSAGES_PER_TURN):
            received = self._front.receive()
            if received is None:
                break
            self._on_client(received)
        self._drop_lost()

    def _on_client(self, received: Received) -> None:
        client, request_id = received.client, None
        owner = owner_of(received.identity, client)
        try:
            data = self._front.unpack(received.frames)
            request_id = id_of(data)
            check_allowed(received.identity, self._front.doorkeeper)
            message = owned(parse_client_message(data), received.identity)
            if isinstance(message, Generate):
                self._on_generate(received, message)
            elif isinstance(message, ResumeRequest):
                self._resumption.resume(client, owner, message)
            elif isinstance(message, CancelRequest):
                self._on_cancel(client, owner, message)
            else:
                self._queries.on_query(client, owner, message, self._usable_info, self._codec)
        except WireError as error:
            self._send(client, Failed(None, error.code, str(error)))
        except (FieldError, TokenizerError, ChatTemplateError) as error:
            self._refuse(client, request_id, Refusal("bad_request", str(error)))
        except Refusal as error:
            self._refuse(client, request_id, error)
        except Exception:  # the border to clients: our own bug must cost one request, not the server
            log.exception("a client's message could not be handled")
            self._refuse(client, request_id, Refusal("engine_error", "internal error in the gateway"))

    def _refuse(self, client: bytes, request_id: int | None, refusal: Refusal) -> None:
        """Answer a message that starts nothing; when its id is in flight, the answer must not end that request."""
        text = str(refusal)
        if request_id is not None and self._table.get(client, request_id) is not None:
            request_id, text = None, f"request {request_id}: {text}"
        self._send(client, Failed(request_id, refusal.code, text, refusal.retry_after_s))

    def _on_generate(self, received: Received, message: Generate) -> None:
        client, identity = received.client, received.identity
        known = self._table.get(client, message.id) or self._table.by_session(message.session, message.id)
        if known is not None:
            raise Refusal("duplicate_id", "a request with this id is in flight; choose another id")
        check_model(message, self._spec.model_name)
        check_state(self._usable_info)
        size = size_of(len(received.frames[-1]), message.n)
        self._quota.check(owner_of(identity, client), size, message.n)
        now = time.monotonic()
        deadline = None if message.timeout_s is None else now + message.timeout_s
        request = Request(client, message, last_sent_s=now, deadline_s=deadline, identity=identity, size=size)
        self._prompts.encode(request, self._codec)

    def _admit(self, request: Request, prompt: bytes) -> None:
        info, weight = check_state(self._info), self._quota.limits.weight_of(request.identity)
        spec, client = request.spec, client_number(request.owner)
        accepted, submits = admit(spec, prompt, self._spec, info, self._next_sequence, client, weight)
        self._next_sequence += len(submits)
        request.prompt_tokens = accepted.prompt_tokens
        self._table.add(request)
        choices = [self._choice(spec, at, each.sequence_id, each.stop_token_ids) for at, each in enumerate(submits)]
        self._table.start(request, choices)
        if spec.session is not None:
            context = pack_context(request, accepted)
            self._send_engine(Resumable(spec.session, request.id, context, submits))
        else:
            for submit in submits:
                self._send_engine(submit)
        self._send(request.client, accepted)

    def _choice(self, spec: Generate, index: int, sequence_id: int, stop_ids: Sequence[int]) -> ChoiceState:
        codec, text = self._codec, None
        if codec is not None:
            bytes_of = codec.shown_bytes if spec.skip_special_tokens else codec.all_bytes
            text = Detokenizer(bytes_of, spec.stop, spec.min_tokens)
        return ChoiceState(index, sequence_id, frozenset(stop_ids), codec, text)

    def _on_cancel(self, client: bytes, owner: str, message: CancelRequest) -> None:
        request = self._table.get(client, message.id)
        if request is None:
            self._queries.cancel_record(client, owner, message.id)
        else:
            self._cancel(request)

    def _cancel(self, request: Request) -> None:
        self._drop_sequences(request)
        for last in request.cancel():
            self._send(request.client, last)
        self._table.remove(request)
        self._send(request.client, request.finished())

    # ---------------------------------------------------------------- ending

    def _fail(self, request: Request, refusal: Refusal) -> None:
        """End a request that was accepted."""
        self._drop_sequences(request)
        self._table.remove(request)
        self._send(request.client, Failed(request.id, refusal.code, str(refusal), refusal.retry_after_s))

    def _fail_all(self) -> None:
        """End every request because the server stops."""
        for request in self._table:
            self._fail(request, Refusal("stopped", "the server has stopped"))

    def _drop_sequences(self, request: Request) -> None:
        for choice in request.choices:
            if choice.finish_reason is None:
                self._send_engine(Cancel(choice.sequence_id, "cancelled"))

    def _drop_lost(self) -> None:
        for client, loss in self._front.take_lost().items():
            requests = self._table.of_client(client)
            log.info("client %s is %s; %d requests end", client.hex(), loss, len(requests))
            for request in requests:
                self._drop_sequences(request)
                self._table.remove(request)
            if loss == "slow":
                text = "messages were not read fast enough; everything in flight on this connection has ended"
                self._send(client, Failed(None, "slow_reader", text))

    def _tick(self) -> None:
        """Keep waiting clients informed and end what is over time."""
        now = time.monotonic()
        if now < self._next_tick_s:
            return
        self._next_tick_s = now + TICK_S
        self._memory.check(self._quota.limits)
        self._front.look()
        for request in self._table:
            if request.deadline_s is not None and now >= request.deadline_s:
                text = f"not finished within timeout_s {request.spec.timeout_s:g}"
                self._fail(request, Refusal("deadline_exceeded", text))
            elif now - request.last_sent_s >= KEEPALIVE_S:
                request.last_sent_s = now
                self._send(request.client, Keepalive(request.id))
        self._queries.give_up_overdue(now, self._usable_info)
        self._resumption.drop_orphans(now)
        self._drop_lost()

    def _send(self, client: bytes, message: ServerMessage) -> None:
        self._front.send(client, to_map(message))


def codec_of(spec: GatewaySpec) -> TextCodec | None:
    """Load the tokenizer; None when the model has none."""
    return load_codec(spec.model_path, spec.model_format)
