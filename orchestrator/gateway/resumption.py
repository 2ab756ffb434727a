"""Go on with a request that another gateway, or another connection, began: from the engine's record of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mgpu.orchestrator.gateway.admission import Refusal
from mgpu.orchestrator.gateway.queries import Queries
from mgpu.orchestrator.gateway.requests import MAX_HELD_TOKENS, ChoiceState, Request, RequestTable
from mgpu.protocol.codec import Codec
from mgpu.protocol.link import Cancel, SequenceRecord
from mgpu.protocol.link import Resumed as Answer
from mgpu.protocol.messages import Accepted, Failed, FailureCode, Generate, Resumed, ResumeRequest, ServerMessage
from mgpu.protocol.schema import int32_array

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


class Replay:
    """The tokens of one choice again, in portions that fit a message: first what the client has, then the rest."""

    def __init__(self, choice: ChoiceState, record: SequenceRecord) -> None:
        self._choice = choice
        self._record = record
        self._tokens = list(int32_array(record.token_ids))
        self._at = 0

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def is_over(self) -> bool:
        """Whether the choice has ended, or all that there is has been absorbed."""
        return self._choice.finish_reason is not None or (self._at == len(self._tokens) and not self._record.finish)

    def skip(self, count: int) -> None:
        """Absorb what the client has already, and forget its text."""
        while self._at < count and self._choice.finish_reason is None:
            self._absorb(min(count, self._at + MAX_HELD_TOKENS), "")
        self._choice.forget_held()

    def next_portion(self) -> None:
        """Absorb some of the rest, and the ending when it is reached."""
        end = min(len(self._tokens), self._at + MAX_HELD_TOKENS)
        self._absorb(end, self._record.finish if end == len(self._tokens) else "")

    def _absorb(self, end: int, finish: str) -> None:
        logprobs = self._record.logprobs
        self._choice.absorb(self._tokens[self._at : end], logprobs[self._at : end], finish)
        self._at = end


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
    ) -> None:
        """``check_allowed`` raises a Refusal for an identity that may not be served any more."""
        self._table = table
        self._queries = queries
        self._make_choice = make_choice
        self._send = send
        self._send_engine = send_engine
        self._check_allowed = check_allowed
        self._orphans: list[_Orphan] = []

    @property
    def has_orphans(self) -> bool:
        """Whether `drop_orphans` has to be called again."""
        return bool(self._orphans)

    def resume(self, client: bytes, message: ResumeRequest) -> None:
        """Detach the request from the connection it was on, and ask for the engine's record of it if that is needed.

        Refusal when that cannot be asked now; then nothing has changed. No limit of requests counts: what the engine
        knows runs already, or has ended, and its journal bounds it.
        """
        request, other = self._table.by_session(message.session, message.id), self._table.get(client, message.id)
        if other is not None and other is not request:
            raise Refusal("duplicate_id", "another request with this id is in flight; choose another id")
        if request is not None and not request.choices:
            self._table.move(request, client)  # its prompt is being tokenized: nothing has been said yet
            self._send(client, Resumed(message.id, [0] * request.spec.n))
            return
        try:
            self._queries.ask_for_record(client, message)
        except Refusal as refusal:
            if request is None or other is None:
                raise
            # Under its id: this client may have taken the request up already, and now waits for this answer alone.
            self._send(client, Failed(message.id, refusal.code, str(refusal), refusal.retry_after_s))
            return
        if request is not None:
            self._table.remove(request)

    def on_record(self, record: Answer) -> None:
        """Go on with the request that the engine tells of, for whoever asked for it last."""
        question = self._queries.take(record)
        if question is None:
            self._orphans.append(_Orphan(_running(record), self._queries.take_late(record), time.monotonic() + GRACE_S))
            return
        assert isinstance(question.message, ResumeRequest)
        if self._queries.awaits_record(question.message):
            return  # its client has connected once more since; going on for a lost connection would end the request
        self._go_on(question.client, question.message, record)

    def drop_orphans(self, now: float) -> None:
        """End what the engine told of too late, unless its client has asked again."""
        due = [orphan for orphan in self._orphans if now >= orphan.due_s]
        self._orphans = [orphan for orphan in self._orphans if now < orphan.due_s]
        for orphan in due:
            if orphan.message is None or not self._queries.awaits_record(orphan.message):
                self._cancel_unfollowed(orphan.sequence_ids)

    def _cancel_unfollowed(self, sequence_ids: list[int]) -> None:
        """End what runs for nobody."""
        for number in sequence_ids:
            if self._table.by_sequence(number) is None:
                self._send_engine(Cancel(number, "cancelled"))

    def _go_on(self, client: bytes, message: ResumeRequest, record: Answer) -> None:
        """Continue a request from the engine's record; what the engine says from now on continues that."""
        refusal = self._refusal(client, message, record)
        if refusal is not None:
            self._cancel_unfollowed(_running(record))
            self._send(client, refusal)
            return
        request, accepted = restored_request(client, message, record.context, time.monotonic())
        request.cached_tokens = record.sequences[0].cached_tokens
        choices = [
            self._make_choice(request.spec, index, each.request_id, each.stop_token_ids)
            for index, each in enumerate(record.sequences)
        ]
        older = self._table.by_session(message.session, message.id)
        if older is not None:
            self._table.remove(older)
        self._table.add(request)
        self._table.start(request, choices)
        for sequence in record.sequences:
            if sequence.finish:
                self._table.quota.ended(sequence.request_id)
            elif sequence.token_ids:
                self._table.quota.begun(sequence.request_id)
        self._send(client, Resumed(request.id, list(message.offsets)))
        self._send(client, accepted)
        for choice, sequence, offset in zip(choices, record.sequences, message.offsets, strict=True):
            self._catch_up(request, choice, sequence, offset)
        if request.done:
            self._table.remove(request)
            self._send(client, request.finished())

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
        counts = [len(each.token_ids) // 4 for each in record.sequences]
        if len(counts) != len(message.offsets) or any(map(int.__gt__, message.offsets, counts)):
            text = f"offsets {list(message.offsets)} do not fit: the choices have {counts} tokens so far"
            return refuse("bad_request", text)
        errors = [each.error for each in record.sequences if each.finish == "error"]
        return refuse("engine_error", errors[0] or "the engine failed") if errors else None

    def _catch_up(self, request: Request, choice: ChoiceState, record: SequenceRecord, offset: int) -> None:
        """Bring one choice to where the engine is, and send what the client does not have."""
        replay = Replay(choice, record)
        replay.skip(replay.num_tokens if offset < 0 else offset)
        while not replay.is_over:
            replay.next_portion()
            if offset >= 0 and choice.finish_reason is None and request.wants_message(choice):
                self._send(request.client, choice.drain(request.id))
        if offset < 0:
            choice.end_early("cancelled")
            choice.forget_held()
        elif request.wants_message(choice):
            self._send(request.client, choice.drain(request.id))
        if choice.finish_reason is not None:
            self._table.end_choice(choice)
            if not record.finish:
                self._send_engine(Cancel(choice.sequence_id, "stop"))


def _running(record: Answer) -> list[int]:
    """Give the sequences that have not ended."""
    return [each.request_id for each in record.sequences if not each.finish]
