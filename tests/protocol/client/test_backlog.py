"""What arrives and is not taken is bounded, for one reader and for all; a reader that waits is not slow."""

import pytest

from mgpu import MgpuError
from mgpu.protocol.client.backlog import Backlogs, UnreadBounds
from mgpu.protocol.client.requests.answer import Answer
from mgpu.protocol.errors import RequestFailed
from mgpu.protocol.front.server_messages import Finished, Tokens

BOUNDS = UnreadBounds(one=10_000, all=25_000, portion=2000)
TOP = {"text": "x", "logprob": -1.0, "top": [(1, -1.0, "x")] * 20}


class Streams:
    """Answers of which some arrive faster than they are taken."""

    def __init__(self, number: int) -> None:
        self.cancelled: list[int] = []
        self.backlogs = Backlogs(BOUNDS, self.cancelled.append)
        self.answers = [Answer({"n": 1, "logprobs": 20}, is_passed_on=True) for _ in range(number)]

    def add(self, at: int, number: int = 1) -> None:
        for _ in range(number):
            if self.answers[at].error is None:
                self.answers[at].add(Tokens(at, 0, "x", [1], [TOP]))
                self.backlogs.note(at, self.answers[at])


def test_a_reader_that_takes_too_little_ends_its_request_and_no_other() -> None:
    streams = Streams(2)
    streams.add(1)
    streams.add(0, 100)
    [slow, fast] = streams.answers
    assert streams.cancelled == [0]
    assert not slow.pieces
    assert isinstance(slow.error, RequestFailed)
    assert slow.error.code == "slow_reader"
    assert "one answer may have 10000" in str(slow.error)
    assert (fast.error, len(fast.pieces)) == (None, 1)


def test_past_the_bound_of_all_the_one_with_most_ends() -> None:
    streams = Streams(40)
    streams.add(7, 2)
    for at in range(40):
        streams.add(at)
    assert streams.cancelled[0] == 7
    assert "all answers together may have 25000" in str(streams.answers[7].error)
    assert streams.answers[39].error is None


def test_a_burst_for_a_reader_that_waits_is_taken_in_portions() -> None:
    streams = Streams(1)
    [answer] = streams.answers
    answer.is_awaited = True
    streams.add(0, 50)
    taken = []
    while pieces := answer.take(BOUNDS.portion):
        assert len(pieces) == 1, "each is larger than a portion"
        taken += pieces
    assert (len(taken), answer.unread_bytes, streams.cancelled) == (50, 0, [])


def test_what_was_taken_or_abandoned_counts_no_more() -> None:
    streams = Streams(40)
    for at in range(40):
        streams.add(at)
        assert streams.answers[at].take(BOUNDS.portion)
        streams.backlogs.count(at, streams.answers[at])
        streams.add(at)
        streams.backlogs.forget(at)
    assert streams.cancelled == []


def test_an_answer_that_is_passed_on_keeps_its_offsets_and_not_itself() -> None:
    [answer] = Streams(1).answers
    answer.add(Tokens(1, 0, "x", [1, 2], [TOP, TOP]))
    answer.add(Tokens(1, 0, "x", [1], [TOP]))
    assert answer.offsets() == [3]
    answer.take(1 << 20)
    assert answer.partial().logprobs == ()
    answer.finish(Finished(1, ["stop"], 1, 3, 0))
    with pytest.raises(MgpuError, match="passed on"):
        answer.completion()
