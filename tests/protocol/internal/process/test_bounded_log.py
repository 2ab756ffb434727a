"""No client can fill the log."""

import logging

import pytest

from mgpu.protocol.internal.process.bounded_log import BoundedLog


def test_a_kind_of_line_is_written_once_a_second_with_a_count(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    bounded = BoundedLog(logging.getLogger("test"), logging.WARNING, clock_s=lambda: now_s)
    for at in range(3000):
        now_s = at / 1000
        bounded.write("client %d", at)
    assert [record.getMessage() for record in caplog.records] == [
        "client 0",
        "client 1000 (999 more since the last such line)",
        "client 2000 (999 more since the last such line)",
    ]


def test_a_traceback_is_written_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    bounded = BoundedLog(logging.getLogger("test"), logging.ERROR)
    for _ in range(2):
        bounded.write("it failed", error=ValueError("why"))
    assert caplog.text.count("it failed") == caplog.text.count("ValueError: why") == 1
