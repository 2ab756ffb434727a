"""Records that come in portions: what is sent of them, and what ends between two of them."""

import time
from dataclasses import replace

import pytest

from harness.servers.resuming_gateway import A, B, ResumingGateway, portion, record
from mgpu.orchestrator.gateway.requests import record_queue
from mgpu.orchestrator.gateway.requests.replay import Replay
from mgpu.orchestrator.gateway.requests.request import Choice, Request
from mgpu.orchestrator.gateway.requests.resume import GRACE_S, RECORD_TIMEOUT_S
from mgpu.orchestrator.gateway.text.detokenizer import Detokenizer
from mgpu.protocol.front import server_messages
from mgpu.protocol.front.client_messages import Generate


def test_a_record_in_portions_is_joined_and_what_comes_between_them_is_void() -> None:
    gateway = ResumingGateway()
    gateway.resume(A, offsets=(2,))
    gateway.answer(0, portion([1, 2, 3], 5))
    assert (gateway.questions[1].known, gateway.questions[1].offsets) == ([3], [2])
    found = gateway.table.by_sequence(7)
    assert found is not None
    assert found[1].is_replaying
    gateway.answer(1, portion([4, 5], 6))
    assert gateway.questions[2].known == [5]
    gateway.answer(2, portion([6], 6))
    assert not found[1].is_replaying
    assert len(gateway.questions) == 3
    held = [token for choice in next(iter(gateway.table)).choices for token in choice.held_ids]
    assert gateway.tokens(A) + held == [3, 4, 5, 6]
    assert gateway.heard(A)[:2] == ["resumed", "accepted"]


def test_the_end_is_said_when_the_last_portion_has_come() -> None:
    gateway = ResumingGateway()
    gateway.resume(A, offsets=(0, 1))
    gateway.answer(0, portion([1, 2], 3, "stop", 7), portion([], 1, "length", 8))
    assert gateway.heard(A) == ["resumed", "accepted"]
    gateway.answer(1, portion([3], 3, "stop", 7), portion([4], 1, "length", 8))
    assert gateway.heard(A) == ["resumed", "accepted", "tokens", "tokens", "finished"]
    assert gateway.tokens(A) == [1, 2, 3]
    assert (len(gateway.table), gateway.quota.num_sequences, gateway.cancelled) == (0, 0, [])


def test_a_request_that_ends_between_two_portions_is_not_taken_up_again() -> None:
    gateway = ResumingGateway()
    gateway.resume(A)
    gateway.answer(0, portion([1], 3))
    gateway.table.remove(next(iter(gateway.table)))
    gateway.answer(1, portion([2, 3], 3))
    assert (len(gateway.table), gateway.quota.num_questions) == (0, 0)


def test_a_client_that_resumes_between_two_portions_gets_everything_anew() -> None:
    gateway = ResumingGateway()
    gateway.resume(A)
    gateway.answer(0, portion([1, 2], 3))
    gateway.resume(B)
    gateway.answer(1, portion([3], 3))
    gateway.answer(2, portion([1, 2, 3], 3, "stop"))
    assert gateway.questions[2].known == []
    assert (gateway.tokens(A), gateway.tokens(B)) == ([], [1, 2, 3])


def test_a_record_whose_next_portion_does_not_come_is_given_up() -> None:
    gateway = ResumingGateway()
    gateway.resume(A)
    gateway.answer(0, portion([1], 3))
    later_s = time.monotonic() + RECORD_TIMEOUT_S
    gateway.resumptions.give_up_overdue(later_s)
    gateway.resumptions.drop_orphans(later_s)
    assert gateway.heard(A)[-1] == "not_ready"
    assert len(gateway.table) == 0
    gateway.resume(A)
    gateway.answer(1, portion([2, 3], 3))  # the late one; it belongs to nobody
    gateway.answer(2, portion([1, 2, 3], 3))
    gateway.resumptions.drop_orphans(later_s + GRACE_S)
    assert [choice.held_ids for request in gateway.table for choice in request.choices] == [[1, 2, 3]]
    assert gateway.cancelled == []


def test_what_is_given_up_before_the_engine_was_asked_does_not_run_on_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = ResumingGateway()
    gateway.resume(A)
    gateway.answer(0, record(7))
    monkeypatch.setattr(record_queue, "MAX_RECORDS_AT_ONCE", 1)
    gateway.resume(b"other", session="another")  # the only place
    gateway.resume(B)
    now = time.monotonic() + RECORD_TIMEOUT_S + 1
    gateway.resumptions.give_up_overdue(now)
    assert gateway.heard(B) == ["not_ready"]
    asked = gateway.questions[-1]
    assert (asked.session, asked.known) == ("s", [-1])
    gateway.answer(-1, record(7, ()))
    gateway.resumptions.drop_orphans(now + 2 * GRACE_S + RECORD_TIMEOUT_S)
    assert gateway.cancelled == [7]


def test_cached_tokens_of_a_choice_that_begins_between_two_portions_count() -> None:
    gateway = ResumingGateway()
    gateway.resume(A, offsets=(0, 0))
    gateway.answer(0, record(1, ()), replace(record(2, (5, 6)), num_tokens=4))
    gateway.answer(
        1, replace(record(1, (9,), "length"), cached_tokens=64), replace(record(2, (7, 8), "length"), num_tokens=4)
    )
    finished = [message for _, message in gateway.sent if isinstance(message, server_messages.Finished)]
    assert [message.cached_tokens for message in finished] == [64]


@pytest.mark.parametrize("offset", range(4))
def test_a_stop_token_that_the_client_has_is_no_stop_string(offset: int) -> None:
    """Its text is not part of the answer, so a stop string of the same text was not found in it."""
    text = Detokenizer({1: b"a", 2: b"b", 9: b"<end>"}.__getitem__, ["<end>"])
    choice = Choice(0, 7, frozenset({9}), None, text)
    replay = Replay(Request(b"", Generate(1), 0.0, None), choice, offset)
    messages = list(replay.take(record(tokens=(1, 2, 9), finish="stop")))
    assert [(each.finish_reason, each.stop_string) for each in messages] == [("stop", None)]
    assert messages[0].text == "ab"[offset:]
