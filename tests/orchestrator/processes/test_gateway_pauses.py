"""Deaths of the gateway that clients can bring about: pauses that grow, however many there are."""

import signal
import time
from array import array
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import zmq

from harness.servers.fake_model import solo_tokens
from harness.servers.gateway_loss import SESSION, lose_the_gateway, resumable
from harness.servers.server_process import config, ready_server
from mgpu.orchestrator.processes import gateway_process
from mgpu.orchestrator.processes.failures import GatewayLost, RestartPause
from mgpu.orchestrator.processes.gateway_process import GatewayProcess
from mgpu.protocol.internal.gateway_messages import RecordQuery
from mgpu.protocol.internal.process.work_record import WorkRecord


@pytest.mark.parametrize("max_restarts", [0, 3])
def test_a_gateway_that_aborts_again_and_again_costs_pauses_only(folder: Path, max_restarts: int) -> None:
    deaths = 4
    with ready_server(folder, {"step_s": 0.01}, max_restarts=max_restarts) as server:
        server.send(resumable(1, [1, 2, 3], 200))
        server.wait_for(lambda: 1 in server.tokens)
        began_s = time.monotonic()
        for _ in range(deaths):
            lose_the_gateway(server, b"abort")
        assert time.monotonic() - began_s >= 0.5 + 1 + 2
        assert "was killed by signal 6 (SIGABRT)" in server.log
        server.send(RecordQuery(5, SESSION, 1))
        server.wait_for(lambda: bool(server.records))
        [record] = server.records[0].sequences
        assert record.finish == "length", "the engine goes on during the pauses"
        assert array("i", record.token_ids).tolist() == solo_tokens([1, 2, 3], 200)
        server.serve(2, [4, 5], 5)
        counters = server.counters()
        assert (counters["gateway_restarts"], counters["gateway_restarts_counted"]) == (deaths, 0)


def test_a_gateway_that_is_busy_for_too_long_is_replaced_uncounted(folder: Path) -> None:
    with ready_server(folder, gateway_timeout_s=2.0, max_restarts=0) as server:
        for _ in range(2):
            lose_the_gateway(server, b"spin")
        assert "the gateway failed: it hangs: it did not answer for 2 s" in server.log
        server.serve(1, [1, 2, 3], 5)


def test_a_signal_during_a_pause_ends_the_server(folder: Path) -> None:
    with ready_server(folder, max_restarts=0) as server:
        for _ in range(3):
            lose_the_gateway(server, b"abort")
        server.socket.send(b"abort")
        server.wait_for(lambda: "restart 4 of the gateway in 2 s" in server.log)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit() == -signal.SIGTERM


def test_a_kill_from_outside_counts(folder: Path) -> None:
    with ready_server(folder, max_restarts=0) as server:
        [gateway] = server.children_like("harness.servers.fake_gateway")
        gateway.kill()
        assert server.wait_exit() == 1
        assert "giving up after 0 restarts" in server.log


@pytest.mark.parametrize("kills", [0, 1])
def test_a_kill_for_want_of_memory_is_told_apart(monkeypatch: pytest.MonkeyPatch, kills: int) -> None:
    counts = iter([7, 7 + kills])
    monkeypatch.setattr(gateway_process, "count_memory_kills", lambda: next(counts))
    runtime = MagicMock(path="/nowhere")
    runtime.bind.return_value = runtime.ipc.return_value = "ipc:///nowhere/front"
    with zmq.Context() as context, GatewayProcess(context, runtime, config(gateway_command=("sleep", "60"))) as gateway:
        gateway.endpoint = "ipc:///nowhere/front"  # it was ready
        gateway.process.send_signal(signal.SIGKILL)
        assert gateway.process.wait(time.monotonic() + 10)
        with pytest.raises(GatewayLost) as lost:
            gateway.check_alive()
        assert lost.value.caused_by_clients is bool(kills)


@pytest.mark.parametrize("is_bound", [False, True])
def test_an_abort_during_the_first_start_may_be_input_once_clients_can_connect(is_bound: bool) -> None:
    runtime = MagicMock(path="/nowhere")
    runtime.bind.return_value = runtime.ipc.return_value = "ipc:///nowhere/front"
    with zmq.Context() as context, GatewayProcess(context, runtime, config(gateway_command=("sleep", "60"))) as gateway:
        if is_bound:
            WorkRecord(gateway._culprits.fd).note_bound()
        gateway.process.send_signal(signal.SIGABRT)
        assert gateway.process.wait(time.monotonic() + 10)
        with pytest.raises(GatewayLost) as lost:
            gateway.check_alive()
        assert lost.value.caused_by_clients is is_bound


def test_pauses_grow_and_shrink_again_after_quiet_minutes() -> None:
    now_s = 0.0
    pause = RestartPause(clock_s=lambda: now_s)
    assert [pause.next_s() for _ in range(7)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    now_s = 8.0 + 125.0
    assert pause.next_s() == 2.0
    now_s = 10_000.0
    assert [pause.next_s() for _ in range(2)] == [0.0, 0.5]
