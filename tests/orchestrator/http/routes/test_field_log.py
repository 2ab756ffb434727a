"""The log names fields without effect, and no client can fill it or make it silent."""

import logging

import pytest

from mgpu.orchestrator.http.routes.field_log import INTERVAL_S, MOST_IN_LINE, MOST_KNOWN, FieldLog


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_each_name_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    fields = FieldLog(clock)
    for _ in range(3):
        fields.note("/v1/completions", ["temprature"])
        clock.now_s += INTERVAL_S
    assert caplog.messages == ["/v1/completions: the field 'temprature' has no effect"]


def test_a_thousand_names_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    fields = FieldLog(clock)
    for _ in range(5):
        fields.note("/v1/completions", [f"field_{number}" for number in range(1000)])
        clock.now_s += INTERVAL_S / 10
    assert len(caplog.messages) == 1
    assert f"({1000 - MOST_IN_LINE} more since the last such line)" in caplog.messages[0]


def test_names_of_others_are_logged_after_a_flood_of_names(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    fields = FieldLog(clock)
    for number in range(2 * MOST_KNOWN):
        fields.note("/v1/completions", [f"flood_{number}"])
        clock.now_s += INTERVAL_S
    fields.note("/v1/chat/completions", ["max_token"])
    assert caplog.messages[-1] == "/v1/chat/completions: the field 'max_token' has no effect"
    assert len(fields._known) <= MOST_KNOWN


def test_a_long_name_with_control_characters_is_cut_and_escaped(caplog: pytest.LogCaptureFixture) -> None:
    FieldLog().note("/v1/completions", ["\x1b[31m\n" + "x" * 10_000])
    [line] = caplog.messages
    assert line.isprintable()
    assert len(line) < 150
    assert caplog.records[0].levelno == logging.WARNING
