"""Requests that change connections, one message of client or engine at a time."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests import quota, record_queue
from mgpu.orchestrator.gateway.requests.admission import ServedModel
from mgpu.orchestrator.gateway.requests.lifecycle import Requests
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.orchestrator.gateway.requests.queries import Queries
from mgpu.orchestrator.gateway.requests.quota import Quota
from mgpu.orchestrator.gateway.requests.request import Choice, Request
from mgpu.orchestrator.gateway.requests.resume import GRACE_S, RECORD_TIMEOUT_S, Resumptions
from mgpu.orchestrator.gateway.requests.resume_context import pack_context
from mgpu.orchestrator.gateway.requests.table import RequestTable
from mgpu.protocol.front import client_messages, server_messages
from mgpu.protocol.front.client_messages import Generate, ResumeRequest
from mgpu.protocol.front.fields import int32_bytes
from mgpu.protocol.front.server_messages import Accepted, ServerMessage
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import Cancel, EngineInfo, GatewaySpec, Resume, Resumed, SequenceRecord

SPEC = GatewaySpec("", "", "", "", "safetensors", "tiny", 300, [], 1 << 20)
INFO = EngineInfo("ready", 512, 4096, "")
A, B = b"connection A", b"connection B"
SIZE, ACCOUNT = 5000, "key:someone"


class Desk:
    """The part of a gateway that resumes. The test is its clients and its engine, and decides which key is revoked."""

    def __init__(self, **limits: int) -> None:
        self.sent: list[tuple[bytes, ServerMessage]] = []
        self.sent_to_engine: list[Any] = []
        self.revoked: set[str] = set()
        self.quota = Quota(ClientLimits(**limits))  # type: ignore[arg-type]
        self.table = RequestTable(self.quota)
        model, outgoing, access = ServedModel(SPEC, INFO, is_loaded=True), cast("Outgoing", self), cast("Any", self)
        self.queries = Queries(model, self.table, outgoing)
        self.resumptions = Resumptions(Requests(model, self.table, outgoing), access, outgoing)

    def to_client(self, connection: bytes, message: ServerMessage) -> None:
        self.sent.append((connection, message))

    def to_engine(self, message: object) -> None:
        self.sent_to_engine.append(message)

    def check(self, identity: str) -> None:
        if identity in self.revoked:
            raise Refusal("not_allowed", "its key is no longer on the list")

    def resume(self, client: bytes, session: str = "s", offsets: tuple[int, ...] = (0,), account: str = "") -> None:
        """Let a client ask for request 1 of a session."""
        message = ResumeRequest(1, session, offsets)
        self.resumptions.resume(client, account or f"uid:0 {client.hex()}", message)

    def answer(self, at: int, *records: SequenceRecord) -> None:
        """Let the engine answer the question that it was asked as number ``at``."""
        question = self.questions[at]
        self.resumptions.on_record(Resumed(question.query_id, context(len(records)), list(records)))

    @property
    def questions(self) -> list[Resume]:
        return [message for message in self.sent_to_engine if isinstance(message, Resume)]

    def tokens(self, client: bytes) -> list[int]:
        """Give the token ids that a client was sent, of all choices."""
        sent = [message for to, message in self.sent if to == client and isinstance(message, server_messages.Tokens)]
        return [token for message in sent for token in message.token_ids]

    def heard(self, client: bytes) -> list[str]:
        """Give the types, or codes, of what a client was sent."""
        return [getattr(message, "code", type(message).__name__.lower()) for to, message in self.sent if to == client]

    @property
    def cancelled(self) -> list[int]:
        return [message.sequence_id for message in self.sent_to_engine if isinstance(message, Cancel)]


def _choice(spec: Generate, index: int, sequence_id: int, stop_ids: Sequence[int]) -> Choice:
    return Choice(index, sequence_id, frozenset(stop_ids), None, None)


def context(n: int) -> bytes:
    """What an earlier gateway noted of the request."""
    spec = Generate(1, n=n, session="s")
    return pack_context(Request(b"", spec, 0.0, None, ACCOUNT, size=SIZE), Accepted(1, "tiny", 3, 16, 0))


def record(sequence_id: int = 7, tokens: Sequence[int] = (5, 6), finish: str = "", error: str = "") -> SequenceRecord:
    return SequenceRecord(sequence_id, [], len(tokens), int32_bytes(list(tokens)), b"", -1, finish, error, 0)


def test_of_two_connections_that_resume_a_request_the_later_one_gets_it() -> None:
    desk = Desk()
    desk.resume(A)
    desk.resume(B)
    desk.answer(0, record())
    desk.answer(1, record(tokens=[5, 6, 7]))
    assert desk.heard(A) == []
    assert desk.heard(B) == ["resumed", "accepted"]
    assert [request.connection for request in desk.table] == [B]


def test_resumed_says_from_where() -> None:
    desk = Desk()
    desk.resume(A, offsets=(2, -1))
    desk.answer(0, record(1), record(2, finish="stop"))
    assert desk.sent[0] == (A, server_messages.Resumed(1, [2, -1]))


def test_a_second_resume_that_cannot_be_asked_leaves_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MAX_QUESTIONS_OF_ACCOUNT", 1)
    desk = Desk(max_client_requests=1)
    desk.resume(A)
    desk.answer(0, record())
    desk.queries.on_query(A, f"uid:0 {A.hex()}", client_messages.Query("stats", 2))
    desk.resume(A)
    failed = desk.sent[-1][1]
    assert isinstance(failed, server_messages.Failed)
    assert (failed.id, failed.code) == (1, "overloaded")  # its client asks once more
    assert [request.connection for request in desk.table] == [A]


def test_one_connection_may_resume_a_request_twice() -> None:
    desk = Desk()
    desk.resume(A)
    desk.answer(0, record())
    desk.resume(A)
    desk.answer(1, record())
    assert desk.heard(A) == ["resumed", "accepted"] * 2
    assert (len(desk.table), desk.quota.num_sequences) == (1, 1)


def test_a_request_that_was_taken_over_leaves_the_sequences_to_the_new_one() -> None:
    desk = Desk()
    older, newer = (Request(client, Generate(1, session="s"), 0.0, None, size=SIZE) for client in (A, B))
    for request in (older, newer):
        desk.table.add(request)
        desk.table.start(request, [_choice(request.spec, 0, 7, [])])
    desk.table.remove(older)
    assert desk.table.by_sequence(7) == (newer, newer.choices[0])
    assert desk.table.by_session("s", 1) is newer
    assert desk.quota.num_sequences == 1
    desk.table.remove(newer)
    desk.quota.ended(7)
    assert (desk.quota.num_sequences, desk.quota.queued_bytes, len(desk.table)) == (0, 0, 0)
    assert not desk.quota._usage


def test_a_resumed_request_weighs_what_it_did_until_its_first_token() -> None:
    desk = Desk()
    desk.resume(A, offsets=(0, 0, 0, 0))
    desk.answer(0, record(1, []), record(2, []), record(3), record(4, finish="length"))
    assert desk.quota.queued_bytes == SIZE // 2
    assert desk.quota.num_sequences == 3
    for number in (1, 2, 3):
        desk.quota.ended(number)
    assert (desk.quota.queued_bytes, desk.quota.num_sequences) == (0, 0)


def test_a_full_server_refuses_no_resume_and_counts_it() -> None:
    desk = Desk(max_client_requests=1, max_sequences=2, max_queue=SIZE)
    stranger = Request(B, Generate(4, n=2), 0.0, None, size=SIZE)
    desk.table.add(stranger)
    desk.resume(A)
    desk.answer(0, record())
    assert desk.heard(A) == ["resumed", "accepted"]
    assert desk.quota.num_sequences == 3


def test_a_resume_with_wrong_offsets_leaves_nothing_running() -> None:
    desk = Desk()
    desk.resume(A, offsets=(9, 0))
    desk.answer(0, record(7), record(8, finish="length"))
    assert desk.heard(A) == ["bad_request"]
    assert desk.cancelled == [7]


def test_when_one_choice_has_failed_the_others_end() -> None:
    desk = Desk()
    desk.resume(A, offsets=(0, 0))
    desk.answer(0, record(7, finish="error", error="broken"), record(8))
    assert desk.heard(A) == ["engine_error"]
    assert desk.cancelled == [8]


@pytest.mark.parametrize(("followed", "cancelled"), [(False, [7]), (True, [])])
def test_a_resume_under_the_id_of_another_request_ends_what_nobody_follows(
    followed: bool, cancelled: list[int]
) -> None:
    desk = Desk()
    desk.resume(A)
    for client, spec, number in ((A, Generate(1), 9), (B, Generate(1, session="s"), 7))[: 1 + followed]:
        request = Request(client, spec, 0.0, None)
        desk.table.add(request)
        desk.table.start(request, [_choice(spec, 0, number, [])])
    desk.answer(0, record())
    assert desk.heard(A) == ["duplicate_id"]
    assert desk.cancelled == cancelled


@pytest.mark.parametrize(("asks_again", "cancelled"), [(False, [7]), (True, [])])
def test_an_answer_that_comes_too_late_ends_the_request_unless_its_client_asks_again(
    asks_again: bool, cancelled: list[int]
) -> None:
    desk = Desk()
    desk.resume(A)
    desk.resumptions.give_up_overdue(time.monotonic() + RECORD_TIMEOUT_S)
    assert desk.heard(A) == ["not_ready"]
    desk.answer(0, record())
    desk.resumptions.drop_orphans(time.monotonic())
    assert desk.cancelled == []
    if asks_again:
        desk.resume(A)
    desk.resumptions.drop_orphans(time.monotonic() + GRACE_S)
    assert not desk.resumptions._orphans
    assert desk.cancelled == cancelled


def test_a_resume_that_cannot_be_asked_takes_nothing_from_the_connection_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quota, "MAX_QUESTIONS_OF_ACCOUNT", 1)
    desk = Desk(max_client_requests=1)
    desk.resume(A)
    desk.answer(0, record())
    desk.resume(B, session="t")
    with pytest.raises(Refusal, match="wait for the engine"):
        desk.resume(B)
    assert [request.connection for request in desk.table] == [A]
    assert desk.cancelled == []


def test_a_key_that_is_taken_away_before_the_engine_answers_gets_nothing() -> None:
    desk = Desk()
    desk.resume(A)
    desk.revoked.add(ACCOUNT)
    desk.answer(0, record())
    assert desk.heard(A) == ["not_allowed"]
    assert desk.cancelled == [7]
    assert len(desk.table) == 0


def portion(tokens: Sequence[int], num_tokens: int, finish: str = "", sequence_id: int = 7) -> SequenceRecord:
    return SequenceRecord(sequence_id, [], num_tokens, int32_bytes(list(tokens)), b"", -1, finish, "", 0)


def test_however_often_a_client_resumes_a_request_the_engine_is_asked_once_at_a_time() -> None:
    desk = Desk()
    for _ in range(1000):
        desk.resume(A)
    assert len(desk.questions) == desk.quota.num_questions == 1
    desk.answer(0, record())
    assert len(desk.questions) == 2  # for the last, as the first may have come on a connection that is gone
    desk.answer(1, record())
    assert desk.heard(A) == ["resumed", "accepted"]
    assert (len(desk.questions), desk.quota.num_questions) == (2, 0)
    assert not desk.quota._questions


def test_all_connections_of_a_key_share_the_bound_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MAX_QUESTIONS_OF_ACCOUNT", 2)
    desk = Desk(max_client_requests=1)
    desk.resume(A, session="s", account=ACCOUNT)
    desk.resume(B, session="t", account=ACCOUNT)
    desk.resume(B, session="s", account=ACCOUNT)  # in the place of the first
    with pytest.raises(Refusal, match="2 questions of this client"):
        desk.resume(b"connection C", session="u", account=ACCOUNT)
    desk.resume(b"connection C", session="u", account="key:another")


def test_the_engine_is_asked_for_so_many_records_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_queue, "MAX_RECORDS_AT_ONCE", 2)
    desk = Desk()
    for session in "abcd":
        desk.resume(session.encode(), session)
    assert [question.session for question in desk.questions] == ["a", "b"]
    desk.resume(B, "d", offsets=(1,))  # has not been asked for yet: it will be asked for B
    desk.answer(1, record(8))
    assert [question.session for question in desk.questions] == ["a", "b", "c"]
    desk.resumptions.give_up_overdue(time.monotonic() + RECORD_TIMEOUT_S)
    assert desk.quota.num_questions == 0
    assert [question.known for question in desk.questions[3:]] == [[-1]]  # its names only, to end it if nobody comes
    desk.resume(B, "d", offsets=(1,))
    assert desk.questions[-1].offsets == [1]


def test_clients_take_turns_at_the_engines_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_queue, "MAX_RECORDS_AT_ONCE", 1)
    desk = Desk()
    for session in "stuv":
        desk.resume(A, session)
    desk.resume(B, "w")
    for at in range(4):
        desk.answer(at)
    assert [question.session for question in desk.questions] == list("stwuv")


def test_a_record_in_portions_is_joined_and_what_comes_between_them_is_void() -> None:
    desk = Desk()
    desk.resume(A, offsets=(2,))
    desk.answer(0, portion([1, 2, 3], 5))
    assert (desk.questions[1].known, desk.questions[1].offsets) == ([3], [2])
    found = desk.table.by_sequence(7)
    assert found is not None
    assert found[1].is_replaying
    desk.answer(1, portion([4, 5], 6))
    assert desk.questions[2].known == [5]
    desk.answer(2, portion([6], 6))
    assert not found[1].is_replaying
    assert len(desk.questions) == 3
    held = [token for choice in next(iter(desk.table)).choices for token in choice.held_ids]
    assert desk.tokens(A) + held == [3, 4, 5, 6]
    assert desk.heard(A)[:2] == ["resumed", "accepted"]


def test_the_end_is_said_when_the_last_portion_has_come() -> None:
    desk = Desk()
    desk.resume(A, offsets=(0, 1))
    desk.answer(0, portion([1, 2], 3, "stop", 7), portion([], 1, "length", 8))
    assert desk.heard(A) == ["resumed", "accepted"]
    desk.answer(1, portion([3], 3, "stop", 7), portion([4], 1, "length", 8))
    assert desk.heard(A) == ["resumed", "accepted", "tokens", "tokens", "finished"]
    assert desk.tokens(A) == [1, 2, 3]
    assert (len(desk.table), desk.quota.num_sequences, desk.cancelled) == (0, 0, [])


def test_a_request_that_ends_between_two_portions_is_not_taken_up_again() -> None:
    desk = Desk()
    desk.resume(A)
    desk.answer(0, portion([1], 3))
    desk.table.remove(next(iter(desk.table)))
    desk.answer(1, portion([2, 3], 3))
    assert (len(desk.table), desk.quota.num_questions) == (0, 0)


def test_a_client_that_resumes_between_two_portions_gets_everything_anew() -> None:
    desk = Desk()
    desk.resume(A)
    desk.answer(0, portion([1, 2], 3))
    desk.resume(B)
    desk.answer(1, portion([3], 3))
    desk.answer(2, portion([1, 2, 3], 3, "stop"))
    assert desk.questions[2].known == []
    assert (desk.tokens(A), desk.tokens(B)) == ([], [1, 2, 3])


def test_a_record_whose_next_portion_does_not_come_is_given_up() -> None:
    desk = Desk()
    desk.resume(A)
    desk.answer(0, portion([1], 3))
    later_s = time.monotonic() + RECORD_TIMEOUT_S
    desk.resumptions.give_up_overdue(later_s)
    desk.resumptions.drop_orphans(later_s)
    assert desk.heard(A)[-1] == "not_ready"
    assert len(desk.table) == 0
    desk.resume(A)
    desk.answer(1, portion([2, 3], 3))  # the late one; it belongs to nobody
    desk.answer(2, portion([1, 2, 3], 3))
    desk.resumptions.drop_orphans(later_s + GRACE_S)
    assert [choice.held_ids for request in desk.table for choice in request.choices] == [[1, 2, 3]]
    assert desk.cancelled == []


def test_what_is_given_up_before_the_engine_was_asked_does_not_run_on_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk()
    desk.resume(A)
    desk.answer(0, record(7))
    monkeypatch.setattr(record_queue, "MAX_RECORDS_AT_ONCE", 1)
    desk.resume(b"other", session="another")  # the only place
    desk.resume(B)
    now = time.monotonic() + RECORD_TIMEOUT_S + 1
    desk.resumptions.give_up_overdue(now)
    assert desk.heard(B) == ["not_ready"]
    asked = desk.questions[-1]
    assert (asked.session, asked.known) == ("s", [-1])
    desk.answer(-1, record(7, ()))
    desk.resumptions.drop_orphans(now + 2 * GRACE_S + RECORD_TIMEOUT_S)
    assert desk.cancelled == [7]


def test_cached_tokens_of_a_choice_that_begins_between_two_portions_count() -> None:
    desk = Desk()
    desk.resume(A, offsets=(0, 0))
    desk.answer(0, record(1, ()), replace(record(2, (5, 6)), num_tokens=4))
    desk.answer(
        1, replace(record(1, (9,), "length"), cached_tokens=64), replace(record(2, (7, 8), "length"), num_tokens=4)
    )
    finished = [message for _, message in desk.sent if isinstance(message, server_messages.Finished)]
    assert [message.cached_tokens for message in finished] == [64]
