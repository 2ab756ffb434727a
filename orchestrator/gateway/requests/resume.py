"""Continue requests for clients that come back, from the engine's records. Five files, in the order of their use:

1. resume_context.py: when a request is admitted, pack what a later gateway needs and leave it with the engine.
2. resume.py (this file): take a client's `resume`, and later the records of the engine.
3. resumption.py: the state of one attempt, from QUEUED to OVER. Its example shows the whole way.
4. record_queue.py: ask the engine for portions of its records, accounts in turns.
5. replay.py: turn each portion into the messages that the client lacks.
"""

import time

from mgpu.orchestrator.gateway.front.access import AccessControl
from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.front.socket import Received
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.orchestrator.gateway.requests.quota import MAX_QUESTIONS
from mgpu.orchestrator.gateway.requests.record_queue import RecordQueue
from mgpu.orchestrator.gateway.requests.replay import Replay
from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.orchestrator.gateway.requests.request_handler import RequestHandler
from mgpu.orchestrator.gateway.requests.resume_context import CONTEXT_CODEC, Context
from mgpu.orchestrator.gateway.requests.resumption import Resumption, ResumptionState
from mgpu.orchestrator.gateway.requests.table import Name
from mgpu.protocol.front.client_messages import ResumeRequest
from mgpu.protocol.front.server_messages import Resumed
from mgpu.protocol.internal.gateway_messages import Cancel, RecordReply, SequenceRecord

RECORD_TIMEOUT_S = 10.0
"""Longer than for other questions: the client has waited already, and the engine may be replacing its workers."""
GRACE_S = 5.0
"""A client that was told to ask again for its request does so within this time."""


class Resumptions:
    """At most one resumption per request waits for the engine; the last client that asked gets the request."""

    def __init__(
        self, requests: RequestHandler, access: AccessControl, outgoing: Outgoing, turns: FairTurns[Received]
    ) -> None:
        """``turns`` are those of clients' messages: what a replay costs is charged there to who has resumed."""
        self._requests = requests
        self._table = requests.table
        self._quota = requests.table.quota
        self._access = access
        self._outgoing = outgoing
        self._turns = turns
        self._queue = RecordQueue(outgoing)
        self._waiting: dict[Name, Resumption] = {}
        """QUEUED, ASKED and OUTDATED."""
        self._abandoned: dict[int, Resumption] = {}
        """ABANDONED, by query id; the oldest are forgotten."""
        self._orphans: dict[int, tuple[float, Name | None]] = {}
        """By sequence, until when it runs for a client that nobody knows now, and the name of its request."""

    # ---------------------------------------------------------- from clients

    def resume(self, connection: bytes, account: Account, message: ResumeRequest) -> None:
        """Detach the request from the connection it was on, and ask for the engine's record of it if there is one.

        Refusal when the engine cannot be asked now; then nothing has changed. The limits of requests do not apply: what
        the engine knows runs already, or has ended, and its journal bounds it.
        """
        request = self._table.by_session(message.session, message.id)
        same_id = self._table.get(connection, message.id)
        if same_id is not None and same_id is not request:
            raise Refusal("duplicate_id", "another request with this id is in flight; choose another id")
        if request is not None and not request.choices:
            # Its prompt is being tokenized: nothing has been sent yet.
            self._table.move(request, connection, account.owner)
            self._outgoing.to_client(connection, Resumed(message.id, [0] * request.spec.n))
            return
        try:
            self._wait_for_record(connection, account, message)
        except Refusal as refusal:
            if same_id is None:
                raise
            # Under its id: the client may have resumed the request before, and now waits for this answer alone.
            self._outgoing.to_client(connection, refusal.answer(message.id))
            return
        if request is not None:
            self._table.remove(request)

    def cancel(self, connection: bytes, account: Account, request_id: int) -> None:
        """End a request that its client waits to resume, as soon as it is known; nothing if there is none."""
        if self._quota.usage_of(account).questions:
            for waiting in self._waiting.values():
                if waiting.connection == connection and waiting.message.id == request_id:
                    waiting.is_cancelled = True

    def keep(self, request: Request) -> bool:
        """Let a request whose connection is lost go on for its client to come back; return whether it may."""
        if not request.spec.keep_s or request.spec.session is None or not request.choices:
            return False
        running = [each.sequence_id for each in request.choices if not each.is_over]
        self._wait_for_client((request.spec.session, request.id), running, request.spec.keep_s)
        self._table.remove(request)
        return True

    def _wait_for_record(self, connection: bytes, account: Account, message: ResumeRequest) -> None:
        waiting = self._waiting.get((message.session, message.id))
        if waiting is None or waiting.account != account:
            self._quota.check_question(account)
        self._quota.count_question(account)
        if waiting is not None:
            self._quota.count_question(waiting.account, -1)
            waiting.hand_over(connection, account, message)
            return
        resumption = Resumption(connection, account, message, time.monotonic() + RECORD_TIMEOUT_S)
        self._waiting[resumption.name] = resumption
        self._queue.add(resumption)

    # ------------------------------------------------------- from the engine

    def on_record(self, record: RecordReply) -> None:
        """Continue the request of a record, for the connection that asked for it last."""
        resumption = self._queue.take_answered(record.query_id)
        if resumption is None:
            late = self._abandoned.pop(record.query_id, None)
            if late is not None:
                late.move_to(ResumptionState.OVER)
            name = None if late is None else late.name
            self._wait_for_client(name, _running(record), GRACE_S)
        elif resumption.state is ResumptionState.OUTDATED:  # continued for a lost connection, the request would end
            self._ask_again(resumption)
        elif resumption.request is not None and resumption.request.is_over:  # cancelled, say, between two portions
            self._end(resumption)
        else:
            began_s, account = time.perf_counter(), resumption.account
            try:
                self._take_portion(resumption, self._checked_context(resumption, record), record)
            except Refusal as refusal:
                self._refuse(resumption, record, refusal)
            self._turns.charge_beside(account.path, time.perf_counter() - began_s)

    def _checked_context(self, resumption: Resumption, record: RecordReply) -> Context:
        """Return the context of a request. Refusal if it cannot be continued for the client that wants it."""
        message = resumption.message
        if not record.sequences:
            raise Refusal("unknown_request", "no such request is known: it never arrived, or it ended too long ago")
        context: Context = CONTEXT_CODEC.decode(record.context)
        self._access.check(context.identity)
        same_id = self._table.get(resumption.connection, message.id)
        if same_id is not None and same_id is not self._table.by_session(*resumption.name):
            raise Refusal("duplicate_id", f"request {message.id}: it is in flight already")
        counts = [each.num_tokens for each in record.sequences]
        if len(counts) != len(message.offsets) or any(map(int.__gt__, message.offsets, counts)):
            text = f"offsets {list(message.offsets)} do not fit: the choices have {counts} tokens so far"
            raise Refusal("bad_request", text)
        errors = [each.error for each in record.sequences if each.finish == "error"]
        if errors:
            raise Refusal("engine_error", errors[0] or "the engine failed")
        return context

    def _refuse(self, resumption: Resumption, record: RecordReply, refusal: Refusal) -> None:
        self._end(resumption)
        if resumption.request is not None:
            self._table.remove(resumption.request)
        self._cancel_unfollowed(_running(record))
        is_other = refusal.code == "duplicate_id"  # an answer under its id would end the other request
        self._outgoing.to_client(resumption.connection, refusal.answer(None if is_other else resumption.message.id))

    def _take_portion(self, resumption: Resumption, context: Context, record: RecordReply) -> None:
        request = resumption.request or self._restore(resumption, context, record)
        request.cached_tokens = record.sequences[0].cached_tokens
        portions = list(zip(resumption.replays, record.sequences, strict=True))
        for replay, sequence in portions:
            if not replay.choice.is_over:
                self._replay(request, replay, sequence)
        if request.is_done:
            self._requests.finish(request)
        elif resumption.is_cancelled:
            self._requests.cancel(request)
        elif all(replay.is_complete(sequence) for replay, sequence in portions):
            for choice in request.choices:
                choice.is_replaying = False  # the engine's next step continues it
        else:
            self._ask_again(resumption)
            return
        self._end(resumption)

    def _replay(self, request: Request, replay: Replay, sequence: SequenceRecord) -> None:
        try:
            messages = list(replay.take(sequence))
        except BaseException as error:
            raise self._requests.text_failure(error) from None
        for message in messages:
            self._outgoing.to_client(request.connection, message)
        if replay.choice.is_over:
            self._requests.end_choice(replay.choice, engine_goes_on=not sequence.finish)

    def _restore(self, resumption: Resumption, context: Context, record: RecordReply) -> Request:
        """Put the request of a first portion into the table, and tell its client."""
        connection, message = resumption.connection, resumption.message
        request = context.request(connection, resumption.account.owner, message.session, time.monotonic())
        older = self._table.by_session(*resumption.name)
        if older is not None:
            self._table.remove(older)
        self._table.add(request)
        choices = [
            self._requests.new_choice(request.spec, index, each.sequence_id, each.stop_token_ids)
            for index, each in enumerate(record.sequences)
        ]
        self._table.start(request, choices)
        for sequence in record.sequences:
            self._orphans.pop(sequence.sequence_id, None)
            if sequence.finish:
                self._quota.ended(sequence.sequence_id)
            elif sequence.num_tokens:
                self._quota.begun(sequence.sequence_id)
        self._outgoing.to_client(connection, Resumed(request.id, list(message.offsets)))
        self._outgoing.to_client(connection, context.accepted)
        resumption.request = request
        resumption.replays = [Replay(request, *each) for each in zip(choices, message.offsets, strict=True)]
        return request

    def _ask_again(self, resumption: Resumption) -> None:
        resumption.move_to(ResumptionState.QUEUED)
        resumption.overdue_s = time.monotonic() + RECORD_TIMEOUT_S
        self._queue.add(resumption)

    def _end(self, resumption: Resumption) -> None:
        resumption.move_to(ResumptionState.OVER)
        self._forget(resumption)

    def _forget(self, resumption: Resumption) -> None:
        del self._waiting[resumption.name]
        self._quota.count_question(resumption.account, -1)

    # ---------------------------------------------------------- from the clock

    def give_up_overdue(self, now: float) -> None:
        """Tell clients whose records do not come to ask again."""
        overdue = [each for each in self._waiting.values() if now >= each.overdue_s]
        for resumption in overdue:
            self._forget(resumption)
            if resumption.request is not None and not resumption.request.is_over:
                self._table.remove(resumption.request)
            refusal = Refusal("not_ready", f"the engine did not answer within {RECORD_TIMEOUT_S:g} s", RETRY_AFTER_S)
            self._outgoing.to_client(resumption.connection, refusal.answer(resumption.message.id))
        self._queue.abandon(overdue)
        self._abandoned |= {each.query_id: each for each in overdue}
        while len(self._abandoned) > MAX_QUESTIONS:
            del self._abandoned[next(iter(self._abandoned))]

    def drop_orphans(self, now: float) -> None:
        """Cancel what has run long enough for clients that have not asked again."""
        for number in [number for number, (due_s, _) in self._orphans.items() if now >= due_s]:
            _, name = self._orphans.pop(number)
            if name not in self._waiting:
                self._cancel_unfollowed([number])

    def _wait_for_client(self, name: Name | None, sequence_ids: list[int], seconds: float) -> None:
        """Let sequences go on so long for a client that may ask for them again, or as long as they may already."""
        due_s = time.monotonic() + seconds
        for number in sequence_ids:
            self._orphans[number] = max(due_s, self._orphans.get(number, (0.0, name))[0]), name

    def _cancel_unfollowed(self, sequence_ids: list[int]) -> None:
        """Cancel those sequences that no request in the table follows."""
        for number in sequence_ids:
            if self._table.by_sequence(number) is None:
                self._outgoing.to_engine(Cancel(number, "cancelled"))


def _running(record: RecordReply) -> list[int]:
    """Return the sequences that have not ended."""
    return [each.sequence_id for each in record.sequences if not each.finish]
