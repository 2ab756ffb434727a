"""The states of a request: a server can say anything at any time, and never leads its client into a wrong state."""

import random
import time
from collections.abc import Sequence

import pytest

from mgpu import RequestFailed, ServerUnreachable
from mgpu.protocol.client.requests.answer import Answer
from mgpu.protocol.client.transport.resumable import RETRY_S, TRANSITIONS, Message, RequestState, ResumableRequest
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.server_messages import Accepted, Failed, Finished, Keepalive, Resumed, ServerMessage, Tokens

REQUEST: Message = {"type": "generate", "id": 1, "prompt": "x", "session": "s" * 16}


def tokens(*ids: int, finish_reason: str | None = None) -> Tokens:
    return Tokens(1, 0, "x" * len(ids), list(ids), None, finish_reason)


def finished(reason: str) -> Finished:
    return Finished(1, [reason], 1, 5, 0)


def take(request: ResumableRequest, messages: Sequence[ServerMessage]) -> list[Message]:
    return [reply for message in messages if (reply := request.take(message)) is not None]


def test_the_example_of_the_theory_goes_from_state_to_state() -> None:
    request = ResumableRequest(REQUEST)
    assert not take(request, [Accepted(1, "tiny", 1, 8, 7), tokens(1, 2, 3)])
    assert request.state is RequestState.RUNNING
    request.disconnect()
    assert request.state is RequestState.DISCONNECTED
    assert request.resume()["offsets"] == [3]
    assert not take(request, [tokens(4)])
    assert request.state is RequestState.RESUMING
    assert not take(request, [Failed(1, "overloaded", "later", 1.0)])
    assert request.state is RequestState.BUSY
    assert request.resume()["offsets"] == [3], "the tokens of an earlier connection were not skipped"
    assert not take(request, [Resumed(1, [3]), tokens(4, 5, finish_reason="stop")])
    assert request.state is RequestState.RESUMED
    assert not take(request, [finished("stop")])
    assert request.state is RequestState.ENDED
    assert request.answer.completion().token_ids == (1, 2, 3, 4, 5)
    assert request.answer.completion().seed == 7


def lose(request: ResumableRequest) -> list[Message]:
    """Let the connection break and the next server say that it does not know the request; return what is sent then."""
    request.disconnect()
    request.resume()
    return take(request, [Failed(1, "unknown_request", "")])


def test_a_request_that_two_gateways_died_of_is_not_sent_a_third_time() -> None:
    request = ResumableRequest(REQUEST)
    assert lose(request) == [REQUEST]
    assert lose(request) == []
    assert request.has_ended
    with pytest.raises(RequestFailed, match="lost this request twice before it accepted it") as caught:
        request.answer.completion()
    assert caught.value.code == "engine_error"


def test_a_request_that_was_accepted_is_not_to_blame_for_what_follows() -> None:
    request = ResumableRequest(REQUEST)
    for _ in range(4):
        take(request, [Accepted(1, "tiny", 1, 8, 7)])
        assert lose(request) == [{**REQUEST, "seed": 7}]


def test_a_request_that_never_arrived_is_sent_again_with_the_seed_it_was_promised() -> None:
    request = ResumableRequest(REQUEST)
    take(request, [Accepted(1, "tiny", 1, 8, 7)])
    request.disconnect()
    request.resume()
    assert take(request, [Failed(1, "unknown_request", "")]) == [{**REQUEST, "seed": 7}]
    assert request.state is RequestState.RUNNING
    take(request, [Failed(1, "overloaded", "full")])
    with pytest.raises(RequestFailed, match="full"):
        request.answer.completion()


def test_a_request_that_was_cancelled_while_nobody_was_connected_has_failed() -> None:
    request = ResumableRequest(REQUEST)
    request.disconnect()
    request.resume()
    take(request, [Resumed(1, [0]), finished("cancelled")])
    with pytest.raises(ServerUnreachable, match="the server ended the request"):
        request.answer.completion()


def test_no_server_can_lead_a_client_into_a_wrong_state() -> None:
    rng = random.Random(3)
    messages = [
        lambda: tokens(1),
        lambda: Keepalive(1),
        lambda: Accepted(1, "tiny", 1, 8, 7),
        lambda: Resumed(1, None),
        lambda: Resumed(1, [rng.randint(0, 3)]),
        lambda: Failed(1, rng.choice(["overloaded", "not_ready", "unknown_request", "stopped"]), ""),
        lambda: finished(rng.choice(["stop", "cancelled"])),
    ]
    steps: set[tuple[RequestState, RequestState]] = set()
    for _ in range(3000):
        request = ResumableRequest(REQUEST)
        while not request.has_ended:
            before = request.state
            if rng.random() < 0.2:
                request.disconnect()
            elif request.state in (RequestState.DISCONNECTED, RequestState.BUSY) and rng.random() < 0.5:
                request.resume()
            else:
                request.take(rng.choice(messages)())
            steps.add((before, request.state))
    kept = {(state, state) for state in RequestState}
    assert steps | kept == {(state, after) for state in TRANSITIONS for after in TRANSITIONS[state]} | kept


@pytest.mark.parametrize(
    "entry", [{}, {"text": "x", "logprob": -1.0}, {"text": "x", "logprob": -1.0, "top": [[1]]}, None, 5, "abc"]
)
def test_log_probabilities_of_another_shape_are_refused(entry: object) -> None:
    message = Tokens(1, 0, "x", [5], [entry])  # type: ignore[list-item]
    with pytest.raises(FieldError, match="log-probabilities"):
        Answer({**REQUEST, "logprobs": 1}).add(message)


def test_before_it_is_accepted_nothing_is_known_of_an_answer() -> None:
    partial = Answer(REQUEST).partial()
    assert (partial.text, partial.model, partial.seed, partial.usage.prompt_tokens) == ("", "", 0, 0)
    assert partial.finish_reason == "cancelled"


@pytest.mark.parametrize("code", ["overloaded", "not_ready"])
@pytest.mark.parametrize(("retry_after_s", "wait_s"), [(5.0, 5.0), (None, RETRY_S)])
def test_a_resume_that_is_refused_for_now_is_sent_again_later(
    code: str, retry_after_s: float | None, wait_s: float
) -> None:
    request = ResumableRequest(REQUEST)
    request.disconnect()
    request.resume()
    before_s = time.monotonic()
    assert not take(request, [Failed(1, code, "later", retry_after_s)])
    assert before_s + wait_s <= request.resume_at_s <= time.monotonic() + wait_s
