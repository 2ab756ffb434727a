"""What counts as silence: only time in which the client's process ran."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from mgpu import ServerUnreachable
from mgpu.protocol.client.transport import timeouts
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.client.transport.session import Session


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def pass_time(self, waits: Iterator[float]) -> None:
        for seconds in waits:
            self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock.monotonic)
    return clock


def silent(seconds: float) -> ServerUnreachable:
    return ServerUnreachable(f"silent for {seconds:g} s")


def test_time_in_which_the_process_stood_still_is_no_silence_of_the_server(clock: Clock) -> None:
    session = cast("Session", SimpleNamespace(channel=SimpleNamespace(silent=silent), until_retry_s=lambda: 1.0))
    request = ResumableRequest({"type": "generate", "id": 1})
    limits = timeouts.ClientTimeouts(600, 5, 15)
    waits = timeouts.until_progress(session, request, clock.now_s + 600, limits)
    clock.now_s += next(waits) + 18  # Ctrl-Z
    begun_s = clock.now_s
    with pytest.raises(ServerUnreachable, match="silent for 15 s"):
        clock.pass_time(waits)
    assert clock.now_s - begun_s == pytest.approx(15, abs=1)
