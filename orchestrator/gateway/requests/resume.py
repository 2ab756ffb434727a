"""Go on with a request that another gateway, or another connection, began: from the engine's record of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mgpu.orchestrator.gateway.requests.admission import Refusal
from mgpu.orchestrator.gateway.requests.queries import Name, Queries
from mgpu.orchestrator.gateway.requests.replay import CatchUp, Replay
from mgpu.orchestrator.gateway.requests.table import ChoiceState, Request, RequestTable
from mgpu.protocol.front.client_messages import Generate, ResumeRequest
from mgpu.protocol.front.server_messages import Accepted, Failed, FailureCode, Resumed, ServerMessage
from mgpu.protocol.internal.codec import Codec
from mgpu.protocol.internal.gateway_messages import Cancel, SequenceRecord
from mgpu.protocol.internal.gateway_messages import Resumed as Answer

GRACE_S = 5.0
"""A client that was told to ask again for its request does so within this time."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a gateway must know of a request to go on with it; the prompt is not part of that."""

    accepted: Accepted
    stream: bool
    n: int
    min_tokens: int
    stop: tuple[str, ...]
    skip_special_tokens: bool
    timeout_s: float | None
    deadline_s: float | None
    """CLOCK_MONOTONIC, the same for all processes of a machine."""
    identity: str
    size: int
    """See `Request.size`."""


_CODEC = Codec(Context)


def pack_context(request: Request, accepted: Accepted) -> bytes:
    """Note what another gateway would need."""
    spec = request.spec
    return _CODEC.encode(
        Context(
            accepted,
            spec.stream,
            spec.n,
            spec.min_tokens,
            spec.stop,
            spec.skip_special_tokens,
            spec.timeout_s,
            request.deadline_s,
            request.identity,
            request.size,
        )
    )


def restored_request(client: bytes, message: ResumeRequest, data: bytes, now: float) -> tuple[Request, Accepted]:
    """Give the request as it was admitted, without its choices."""
    context: Context = _CODEC.decode(data)
    spec = Generate(
        message.id,
        stream=context.stream,
        n=context.n,
        min_tokens=context.min_tokens,
        stop=context.stop,
        skip_special_tokens=context.skip_special_tokens,
        timeout_s=context.timeout_s,
        session=message.session,
    )
    request = Request(client, spec, now, context.deadline_s, context.identity, size=context.size)
    request.prompt_tokens = context.accepted.prompt_tokens
    return request, context.accepted


def identity_of(data: bytes) -> str:
    """Give whose request a packed context is of."""
    context: Context = _CODEC.decode(data)
    return context.identity


@dataclass(frozen=True, slots=True)
class _Orphan:
    """What runs for a client that was told to ask again before the engine told of it."""

    sequence_ids: list[int]
    message: ResumeRequest | None
    due_s: float


class Resumption:
    """Take requests over for clients that come back."""

    def __init__(
        self,
        table: RequestTable,
        queries: Queries,
        make_choice: Callable[[Generate, int, int, Sequence[int]], ChoiceState],
        send: Callable[[bytes, ServerMessage], None],
        send_engine: Callable[[Cancel], None],
        check_allowed: Callable[[str], None],
        cancel: Callable[[Request], None],
    ) -> None:
        """``check_allowed`` raises a Refusal for an identity that may not be served any more."""
        self._table = table
        self._queries = queries
        self._make_choice = make_choice
        self._send = send
        self._send_engine = send_engine
        self._check_allowed = check_allowed
        self._cancel = cancel
        self._orphans: list[_Orphan] = []
        self._catching_up: dict[Name, CatchUp] = {}
        """Requests of which the next portion has been asked for."""

    def resume(self, client: bytes, owner: str, message: ResumeRequest) -> None:
        """Detach the request from the connection it was on, and ask for the engine's record of it if that is needed.

        ``owner`` is whose question it is. Refusal when that cannot be asked now; then nothing has changed. No limit of
        requests counts: what the engine knows runs already, or has ended, and its journal bounds it.
        """
        request, other = self._table.by_session(message.session, message.id), self._table.get(client, message.id)
        if other is not None and other is not request:
            raise Refusal("duplicate_id", "another request with this id is in flight; choose another id")
        if request is not None and not request.choices:
            self._table.move(request, client)  # its prompt is being tokenized: nothing has been said yet
            self._send(client, Resumed(message.id, [0] * request.spec.n))
            return
        try:
            self._queries.ask_for_record(client, owner, message)
        except Refusal as refusal:
            if request is None or other is None:
                raise
            # Under its id: this client may have taken the request up already, and now waits for this answer alone.
            self._send(client, Failed(message.id, refusal.code, str(refusal), refusal.retry_after_s))
            return
        self._catching_up.pop((message.session, message.id), None)
        if request is not None:
            self._table.remove(request)

    def on_record(self, record: Answer) -> None:
        """Go on with the request that the engine tells of, for whoever asked for it last."""
        question = self._queries.take(record)
        if question is None:
            self._orphans.append(_Orphan(_running(record), self._queries.take_late(record), time.monotonic() + GRACE_S))
            return
        assert isinstance(question.message, ResumeRequest)
        if question.is_stale:  # going on for a connection that is lost would end the request
            self._queries.ask_on(question)
            return
        name = (question.message.session, question.message.id)
        catch_up = self._go_on(question.client, question.message, record)
        request = self._table.by_session(*name) if question.is_cancelled else None
        if request is not None:
            self._cancel(request)
        elif catch_up is not None:
            self._catching_up[name] = catch_up
            self._queries.ask_on(question, catch_up.known)

    def drop_orphans(self, now: float) -> None:
        """End what the engine told of too late, unless its client has asked again, and what it tells no more of."""
        due = [orphan for orphan in self._orphans if now >= orphan.due_s]
        self._orphans = [orphan for orphan in self._orphans if now < orphan.due_s]
        for orphan in due:
            message = orphan.message
            if message is None or not self._queries.awaits_record((message.session, message.id)):
                self._cancel_unfollowed(orphan.sequence_ids)
        for name in [name for name in self._catching_up if not self._queries.awaits_record(name)]:
            request = self._catching_up.pop(name).request
            if not request.is_over:
                self._table.remove(request)  # its client was told to ask again

    def _cancel_unfollowed(self, sequence_ids: list[int]) -> None:
        """End what runs for nobody."""
        for number in sequence_ids:
            if self._table.by_sequence(number) is None:
                self._send_engine(Cancel(number, "cancelled"))

    def _go_on(self, client: bytes, message: ResumeRequest, record: Answer) -> CatchUp | None:
        """Continue a request with a portion of the engine's record; None when no more are needed."""
        catch_up = self._catching_up.pop((message.session, message.id), None)
        if catch_up is not None and catch_up.request.is_over:
            return None  # cancelled, say, between two portions
        refusal = self._refusal(client, message, record)
        if refusal is not None:
            if catch_up is not None:
                self._table.remove(catch_up.request)
            self._cancel_unfollowed(_running(record))
            self._send(client, refusal)
            return None
        if catch_up is None:
            catch_up = self._begin(client, message, record)
        catch_up.request.cached_tokens = record.sequences[0].cached_tokens
        for replay, sequence in zip(catch_up.replays, record.sequences, strict=True):
            if not replay.is_over:
                self._absorb(catch_up.request, replay, sequence)
        if not catch_up.is_level(record.sequences):
            return catch_up
        catch_up.end()  # what the engine says from now on continues this
        if catch_up.request.done:
            self._table.remove(catch_up.request)
            self._send(client, catch_up.request.finished())
        return None

    def _begin(self, client: bytes, message: ResumeRequest, record: Answer) -> CatchUp:
        """Take a request in at its first portion, and tell its client."""
        request, accepted = restored_request(client, message, record.context, time.monotonic())
        choices = [
            self._make_choice(request.spec, index, each.sequence_id, each.stop_token_ids)
            for index, each in enumerate(record.sequences)
        ]
        older = self._table.by_session(message.session, message.id)
        if older is not None:
            self._table.remove(older)
        self._table.add(request)
        self._table.start(request, choices)
        for sequence in record.sequences:
            if sequence.finish:
                self._table.quota.ended(sequence.sequence_id)
            elif sequence.num_tokens:
                self._table.quota.begun(sequence.sequence_id)
        self._send(client, Resumed(request.id, list(message.offsets)))
        self._send(client, accepted)
        return CatchUp(request, message.offsets)

    def _absorb(self, request: Request, replay: Replay, record: SequenceRecord) -> None:
        """Bring a choice as far as a record goes, and send what the client does not have."""
        for message in replay.take(record, request):
            self._send(request.client, message)
        if replay.is_over:
            self._table.end_choice(replay.choice)
            if not record.finish:
                self._send_engine(Cancel(replay.choice.sequence_id, "stop"))

    def _refusal(self, client: bytes, message: ResumeRequest, record: Answer) -> Failed | None:
        def refuse(code: FailureCode, text: str) -> Failed:
            return Failed(message.id, code, text)

        if not record.sequences:
            return refuse("unknown_request", "no such request is known: it never arrived, or it ended too long ago")
        try:
            self._check_allowed(identity_of(record.context))
        except Refusal as refusal:
            return refuse(refusal.code, str(refusal))
        other = self._table.get(client, message.id)
        if other is not None and other is not self._table.by_session(message.session, message.id):
            return Failed(None, "duplicate_id", f"request {message.id}: it is in flight already")
        counts = [each.num_tokens for each in record.sequences]
        if len(counts) != len(message.offsets) or any(map(int.__gt__, message.offsets, counts)):
            text = f"offsets {list(message.offsets)} do not fit: the choices have {counts} tokens so far"
            return refuse("bad_request", text)
        errors = [each.error for each in record.sequences if each.finish == "error"]
        return refuse("engine_error", errors[0] or "the engine failed") if errors else None


def _running(record: Answer) -> list[int]:
    """Give the sequences that have not ended."""
    return [each.sequence_id for each in record.sequences if not each.finish]
