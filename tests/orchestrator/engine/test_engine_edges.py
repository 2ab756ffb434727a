"""The engine beside parts that fail at a bad moment; the parts are stand-ins."""

import os
import select
import signal
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest

from harness.servers.server_process import config
from mgpu.orchestrator.engine.engine import Engine
from mgpu.orchestrator.engine.life_cycle import ServerState
from mgpu.orchestrator.host.signals import Signals
from mgpu.orchestrator.processes.failures import GatewayLost


class Parts:
    """An engine, and what it was made of."""

    def __init__(self, signals: Signals) -> None:
        self.scheduler, self.gateway, self.http, self.workers = MagicMock(), MagicMock(), MagicMock(), MagicMock()
        self.runtime, self.notifier, self.reloader = MagicMock(), MagicMock(), MagicMock()
        self.engine: Any = Engine(
            config(),
            self.scheduler,
            self.gateway,
            self.http,
            self.workers,
            signals,
            self.runtime,
            self.notifier,
            self.reloader,
        )


@pytest.fixture
def parts() -> Iterator[Parts]:
    with Signals() as signals:
        yield Parts(signals)


def test_a_reload_ends_for_systemd_even_if_the_gateway_is_gone(parts: Parts) -> None:
    parts.gateway.reload.side_effect = GatewayLost("gone")
    with pytest.raises(GatewayLost):
        parts.engine._reload()
    parts.notifier.reloaded.assert_called_once_with()


@pytest.mark.parametrize("gateway", [True, False])
@pytest.mark.parametrize("http", [True, False])
def test_a_process_that_follows_after_a_pause_is_watched(parts: Parts, gateway: bool, http: bool) -> None:
    parts.gateway.start_if_due.return_value, parts.http.start_if_due.return_value = gateway, http
    parts.engine._make_poller = MagicMock()
    parts.engine._run_periodic_work()
    assert parts.engine._make_poller.call_count == (gateway or http)


@pytest.mark.parametrize("is_ready", [True, False])
def test_what_the_http_process_has_reported_is_no_longer_waited_for(parts: Parts, is_ready: bool) -> None:
    parts.http.notice.return_value, parts.workers.advance.return_value = is_ready, False
    parts.engine._make_poller = MagicMock()
    parts.engine._handle({})
    assert parts.engine._make_poller.call_count == is_ready


def test_a_reload_while_the_server_stops_does_not_hurry_it(parts: Parts) -> None:
    readable: list[bool] = []

    def stop(_deadline_s: float, hurry_fd: int) -> None:
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
            readable.append(bool(select.select([hurry_fd], [], [], 0.1)[0]))

    parts.workers.stop.side_effect = stop
    parts.engine._shut_down("")
    assert readable == [False, True]


def test_after_a_recovery_the_gateway_has_its_whole_time_to_answer(parts: Parts) -> None:
    parts.engine._life.state = ServerState.RECOVERING
    parts.gateway.known_state = ""
    parts.workers.is_ready = True
    for _ in range(3):
        parts.engine._update_state()
    assert parts.engine._life.state is ServerState.READY
    parts.runtime.announce.assert_not_called()


def test_a_signal_before_the_first_plan_of_a_start_ends_it_once(parts: Parts) -> None:
    engine = parts.engine
    engine._start, engine._shut_down, engine._wait = MagicMock(), MagicMock(), MagicMock()
    engine._bridge.take_in = lambda: engine._signals.received.append(signal.SIGTERM)
    assert engine.run() == -signal.SIGTERM
    engine._shut_down.assert_called_once_with("")
    engine._wait.assert_not_called()
