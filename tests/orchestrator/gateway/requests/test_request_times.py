"""What is counted of requests, and the line that the log gets of each."""

import logging
from typing import Any, cast

import pytest

from harness.servers.resuming_gateway import A, ResumingGateway, record
from mgpu.orchestrator.gateway.requests.request import Choice, Request
from mgpu.orchestrator.gateway.requests.request_times import RequestTimes
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.internal.gateway_messages import Outputs


def make_request(began_s: float | None = 10.0) -> tuple[Request, Choice]:
    choice = Choice(0, 1, frozenset(), None, None)
    spec = Generate(id=5, prompt="secret text")
    request = Request(b"peer", spec, 10.0, None, "uid:1000", choices=[choice], began_s=began_s)
    return request, choice


def test_first_token_pauses_and_the_whole_are_timed_and_reasons_counted() -> None:
    times, (request, choice) = RequestTimes(), make_request()
    times.on_tokens(request, choice, 1, 10.2)
    times.on_tokens(request, choice, 2, 10.6)  # two tokens of one step
    choice.finish_reason = "length"
    times.on_end(request, 11.0)
    counters = times.counters()
    assert counters["first_token_s_sum"] == pytest.approx(0.2)
    assert counters["between_tokens_s_le_inf"] == 2
    assert counters["between_tokens_s_sum"] == pytest.approx(0.4)
    assert counters["request_s_sum"] == pytest.approx(1.0)
    assert [counters[f"ended_{reason}"] for reason in ("stop", "length", "abort", "error")] == [0, 1, 0, 0]


def test_a_request_that_another_gateway_began_has_no_times() -> None:
    times, (request, choice) = RequestTimes(), make_request(began_s=None)
    times.on_tokens(request, choice, 1, 10.2)
    times.on_end(request, 11.0, "engine_error")
    counters = times.counters()
    assert counters["first_token_s_le_inf"] == counters["request_s_le_inf"] == 0
    assert counters["ended_error"] == 1


def test_the_line_of_a_request_has_numbers_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    times, (request, choice) = RequestTimes(logs_requests=True), make_request()
    with caplog.at_level(logging.INFO):
        request.queue_s = 0.15
        times.on_tokens(request, choice, 1, 10.2)
        choice.num_tokens = 1
        times.on_end(request, 11.0)
    [line] = caplog.messages
    assert line == (
        'id=5 account="uid:1000 70656572" prompt=0 cached=0 new=1 queue_s=0.150 first_token_s=0.200 duration_s=1.000 '
        "reason=cancelled"
    )


def test_a_request_has_the_time_in_the_queue_of_its_first_choice_to_run() -> None:
    gateway = ResumingGateway()
    gateway.resume(A, offsets=(0, 0))
    gateway.answer(0, record(7), record(8))
    for queue_s in ({9: 7.0}, {8: 0.25}, {7: 0.5}):
        outputs = Outputs([99], [[]], [[]], ["cancelled"], [""], [0], queue_s)
        cast("Any", gateway.resumptions)._requests.on_outputs(outputs)
    [request] = gateway.table
    assert request.queue_s == 0.25


def test_a_request_that_never_ran_has_no_time_in_the_queue(caplog: pytest.LogCaptureFixture) -> None:
    times, (request, _) = RequestTimes(logs_requests=True), make_request()
    with caplog.at_level(logging.INFO):
        times.on_end(request, 11.0)
    assert " queue_s=- first_token_s=- duration_s=1.000 " in caplog.text


def test_nothing_is_logged_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    times, (request, _) = RequestTimes(), make_request()
    with caplog.at_level(logging.INFO):
        times.on_end(request, 11.0)
    assert not caplog.messages
