"""Requests that change connections: who gets them, what is refused, and what runs for nobody."""

import time

import pytest

from harness.servers.resuming_gateway import ACCOUNT, KEEP_S, KEY, SIZE, A, B, ResumingGateway, new_choice, record
from mgpu.orchestrator.gateway.front.account import Account, account_of
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.front.socket import Received
from mgpu.orchestrator.gateway.requests import quota, record_queue
from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.orchestrator.gateway.requests.resume import GRACE_S, RECORD_TIMEOUT_S
from mgpu.protocol.front import client_messages, server_messages
from mgpu.protocol.front.client_messages import Generate


@pytest.fixture
def gateway() -> ResumingGateway:
    return ResumingGateway()


def test_of_two_connections_that_resume_a_request_the_later_one_gets_it(gateway: ResumingGateway) -> None:
    gateway.resume(A)
    gateway.resume(B)
    gateway.answer(0, record())
    gateway.answer(1, record(tokens=[5, 6, 7]))
    assert gateway.heard(A) == []
    assert gateway.heard(B) == ["resumed", "accepted"]
    assert [request.connection for request in gateway.table] == [B]


def test_the_replay_of_an_answer_is_charged_to_who_has_resumed_it(gateway: ResumingGateway) -> None:
    """Then others are served before its next message."""
    gateway.resume(A)
    gateway.answer(0, record(tokens=[5] * 1000))
    for connection, owner in ((A, "pid:1"), (B, "pid:2")):
        message = Received(connection, [b"x"], "uid:0", owner)
        gateway.turns.put(message.account.path, message)
    taken = gateway.turns.take()
    assert taken is not None
    assert taken[1].connection == B


def test_resumed_says_from_where(gateway: ResumingGateway) -> None:
    gateway.resume(A, offsets=(2, -1))
    gateway.answer(0, record(1), record(2, finish="stop"))
    assert gateway.sent[0] == (A, server_messages.Resumed(1, [2, -1]))


def test_a_second_resume_that_cannot_be_asked_leaves_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MAX_QUESTIONS_OF_ACCOUNT", 1)
    gateway = ResumingGateway(max_client_requests=1)
    gateway.resume(A)
    gateway.answer(0, record())
    gateway.queries.on_query(A, account_of("uid:0", A, "pid:1"), client_messages.Query("stats", 2))
    gateway.resume(A)
    failed = gateway.sent[-1][1]
    assert isinstance(failed, server_messages.Failed)
    assert (failed.id, failed.code) == (1, "overloaded")  # its client asks once more
    assert [request.connection for request in gateway.table] == [A]


def test_one_connection_may_resume_a_request_twice(gateway: ResumingGateway) -> None:
    gateway.resume(A)
    gateway.answer(0, record())
    gateway.resume(A)
    gateway.answer(1, record())
    assert gateway.heard(A) == ["resumed", "accepted"] * 2
    assert (len(gateway.table), gateway.quota.num_sequences) == (1, 1)


def test_a_request_that_was_taken_over_leaves_the_sequences_to_the_new_one(gateway: ResumingGateway) -> None:
    older, newer = (Request(client, Generate(1, session="s"), 0.0, None, size=SIZE) for client in (A, B))
    for request in (older, newer):
        gateway.table.add(request)
        gateway.table.start(request, [new_choice(request.spec, 0, 7, [])])
    gateway.table.remove(older)
    assert gateway.table.by_sequence(7) == (newer, newer.choices[0])
    assert gateway.table.by_session("s", 1) is newer
    assert gateway.quota.num_sequences == 1
    gateway.table.remove(newer)
    gateway.quota.ended(7)
    assert (gateway.quota.num_sequences, gateway.quota.queued_bytes, len(gateway.table)) == (0, 0, 0)
    assert not gateway.quota._usage


def test_a_resumed_request_weighs_what_it_did_until_its_first_token(gateway: ResumingGateway) -> None:
    gateway.resume(A, offsets=(0, 0, 0, 0))
    gateway.answer(0, record(1, []), record(2, []), record(3), record(4, finish="length"))
    assert gateway.quota.queued_bytes == SIZE // 2
    assert gateway.quota.num_sequences == 3
    for number in (1, 2, 3):
        gateway.quota.ended(number)
    assert (gateway.quota.queued_bytes, gateway.quota.num_sequences) == (0, 0)


def test_a_full_server_refuses_no_resume_and_counts_it() -> None:
    gateway = ResumingGateway(max_client_requests=1, max_sequences=2, max_queue=SIZE)
    stranger = Request(B, Generate(4, n=2), 0.0, None, size=SIZE)
    gateway.table.add(stranger)
    gateway.resume(A)
    gateway.answer(0, record())
    assert gateway.heard(A) == ["resumed", "accepted"]
    assert gateway.quota.num_sequences == 3


def test_a_resume_with_wrong_offsets_leaves_nothing_running(gateway: ResumingGateway) -> None:
    gateway.resume(A, offsets=(9, 0))
    gateway.answer(0, record(7), record(8, finish="length"))
    assert gateway.heard(A) == ["bad_request"]
    assert gateway.cancelled == [7]


def test_when_one_choice_has_failed_the_others_end(gateway: ResumingGateway) -> None:
    gateway.resume(A, offsets=(0, 0))
    gateway.answer(0, record(7, finish="error", error="broken"), record(8))
    assert gateway.heard(A) == ["engine_error"]
    assert gateway.cancelled == [8]


@pytest.mark.parametrize(("followed", "cancelled"), [(False, [7]), (True, [])])
def test_a_resume_under_the_id_of_another_request_ends_what_nobody_follows(
    followed: bool, cancelled: list[int]
) -> None:
    gateway = ResumingGateway()
    gateway.resume(A)
    for client, spec, number in ((A, Generate(1), 9), (B, Generate(1, session="s"), 7))[: 1 + followed]:
        request = Request(client, spec, 0.0, None)
        gateway.table.add(request)
        gateway.table.start(request, [new_choice(spec, 0, number, [])])
    gateway.answer(0, record())
    assert gateway.heard(A) == ["duplicate_id"]
    assert gateway.cancelled == cancelled


@pytest.mark.parametrize(("asks_again", "cancelled"), [(False, [7]), (True, [])])
def test_an_answer_that_comes_too_late_ends_the_request_unless_its_client_asks_again(
    asks_again: bool, cancelled: list[int]
) -> None:
    gateway = ResumingGateway()
    gateway.resume(A)
    gateway.resumptions.give_up_overdue(time.monotonic() + RECORD_TIMEOUT_S)
    assert gateway.heard(A) == ["not_ready"]
    gateway.answer(0, record())
    gateway.resumptions.drop_orphans(time.monotonic())
    assert gateway.cancelled == []
    if asks_again:
        gateway.resume(A)
    gateway.resumptions.drop_orphans(time.monotonic() + GRACE_S)
    assert not gateway.resumptions._orphans
    assert gateway.cancelled == cancelled


@pytest.mark.parametrize("has_late_answer", [False, True])
def test_a_request_that_is_lost_again_has_all_of_its_time_again(
    monkeypatch: pytest.MonkeyPatch, has_late_answer: bool
) -> None:
    lost_s = 20.0
    gateway, began_s = ResumingGateway(), time.monotonic()
    gateway.resume(A)
    gateway.answer(0, record())
    for now_s, client in ((0.0, B), (lost_s, None)):
        monkeypatch.setattr(time, "monotonic", lambda now_s=now_s: began_s + now_s)
        [request] = gateway.table
        assert gateway.resumptions.keep(request)
        if client:
            gateway.resume(client)
            gateway.answer(1, record())
    if has_late_answer:  # an answer that nobody waits for shortens nothing
        gateway.resume(A)
        gateway.resumptions.give_up_overdue(began_s + lost_s + RECORD_TIMEOUT_S)
        gateway.answer(2, record())
    gateway.resumptions.drop_orphans(began_s + lost_s + KEEP_S - 1)
    assert gateway.cancelled == []
    gateway.resumptions.drop_orphans(began_s + lost_s + KEEP_S + 1)
    assert gateway.cancelled == [7]


def test_a_resume_that_cannot_be_asked_takes_nothing_from_the_connection_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quota, "MAX_QUESTIONS_OF_ACCOUNT", 1)
    gateway = ResumingGateway(max_client_requests=1)
    gateway.resume(A)
    gateway.answer(0, record())
    gateway.resume(B, session="t")
    with pytest.raises(Refusal, match="wait for the engine"):
        gateway.resume(B)
    assert [request.connection for request in gateway.table] == [A]
    assert gateway.cancelled == []


def test_a_key_that_is_taken_away_before_the_engine_answers_gets_nothing(gateway: ResumingGateway) -> None:
    gateway.resume(A)
    gateway.revoked.add(KEY)
    gateway.answer(0, record())
    assert gateway.heard(A) == ["not_allowed"]
    assert gateway.cancelled == [7]
    assert len(gateway.table) == 0


def test_however_often_a_client_resumes_a_request_the_engine_is_asked_once_at_a_time(gateway: ResumingGateway) -> None:
    for _ in range(1000):
        gateway.resume(A)
    assert len(gateway.questions) == gateway.quota.num_questions == 1
    gateway.answer(0, record())
    assert len(gateway.questions) == 2  # for the last, as the first may have come on a connection that is gone
    gateway.answer(1, record())
    assert gateway.heard(A) == ["resumed", "accepted"]
    assert (len(gateway.questions), gateway.quota.num_questions) == (2, 0)
    assert account_of("uid:0", A, "pid:1") not in gateway.quota._usage


def test_all_connections_of_a_key_share_the_bound_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MAX_QUESTIONS_OF_ACCOUNT", 2)
    gateway = ResumingGateway(max_client_requests=1)
    gateway.resume(A, session="s", account=ACCOUNT)
    gateway.resume(B, session="t", account=ACCOUNT)
    gateway.resume(B, session="s", account=ACCOUNT)  # in the place of the first
    with pytest.raises(Refusal, match="2 questions of this client"):
        gateway.resume(b"connection C", session="u", account=ACCOUNT)
    gateway.resume(b"connection C", session="u", account=Account("key:another", "key:another"))


def test_the_engine_is_asked_for_so_many_records_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_queue, "MAX_RECORDS_AT_ONCE", 2)
    gateway = ResumingGateway()
    for session in "abcd":
        gateway.resume(session.encode(), session)
    assert [question.session for question in gateway.questions] == ["a", "b"]
    gateway.resume(B, "d", offsets=(1,))  # has not been asked for yet: it will be asked for B
    gateway.answer(1, record(8))
    assert [question.session for question in gateway.questions] == ["a", "b", "c"]
    gateway.resumptions.give_up_overdue(time.monotonic() + RECORD_TIMEOUT_S)
    assert gateway.quota.num_questions == 0
    assert [question.known for question in gateway.questions[3:]] == [[-1]]  # its names only, to end it if nobody comes
    gateway.resume(B, "d", offsets=(1,))
    assert gateway.questions[-1].offsets == [1]


def test_clients_take_turns_at_the_engines_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_queue, "MAX_RECORDS_AT_ONCE", 1)
    gateway = ResumingGateway()
    for session in "stuv":
        gateway.resume(A, session)
    gateway.resume(B, "w")
    for at in range(4):
        gateway.answer(at)
    assert [question.session for question in gateway.questions] == list("swtuv")


def test_a_request_whose_prompt_is_being_tokenized_goes_on_on_the_new_connection(gateway: ResumingGateway) -> None:
    request = Request(A, Generate(1, prompt="x", session="s", n=2), 0.0, None, size=SIZE, is_encoding=True)
    gateway.table.add(request)
    gateway.resume(B, offsets=(0, 0))
    assert gateway.sent == [(B, server_messages.Resumed(1, [0, 0]))]
    assert not gateway.questions
    assert [each.connection for each in gateway.table] == [B]
    assert gateway.table.get(B, 1) is gateway.table.by_session("s", 1) is request
