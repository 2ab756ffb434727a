"""Whole servers in their own processes: start, serve, drain, fail, and leave nothing behind."""

import random
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

from harness.servers.fake_model import solo_tokens
from harness.servers.server_process import ServerProcess, config, ready_server, running_server
from harness.waiting import eventually
from mgpu.orchestrator.host.runtime_dir import RuntimeDirError
from mgpu.orchestrator.server import Server
from mgpu.protocol.discovery import running_servers
from mgpu.protocol.internal.gateway_messages import LINK, Cancel, StateKnown, StatsQuery


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def assert_nothing_is_left(folder: Path, children: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert list((folder / "run").iterdir()) == []


@pytest.mark.parametrize(("num_stages", "ranks_per_stage"), [(1, 1), (1, 2), (2, 1)])
def test_requests_equal_their_solo_runs(folder: Path, num_stages: int, ranks_per_stage: int) -> None:
    with ready_server(folder, num_stages=num_stages, ranks_per_stage=ranks_per_stage) as server:
        shapes = {i: (1 + 7 * i % 50, 1 + 11 * i % 40) for i in range(24)}
        for i, (prompt_len, max_tokens) in shapes.items():
            server.submit(i, prompt_of(i, prompt_len), max_tokens)
        server.send(Cancel(5, "cancelled"))
        server.wait_for(lambda: len(server.finish) == len(shapes))
        for i, (prompt_len, max_tokens) in shapes.items():
            solo = solo_tokens(prompt_of(i, prompt_len), max_tokens)
            if server.finish[i] == "cancelled":
                assert i == 5
            else:
                assert server.tokens[i] == solo
        server.send(StatsQuery(1))
        server.wait_for(lambda: bool(server.stats))
        counters = server.stats[0].counters
        assert counters["running"] == counters["waiting"] == counters["kv_blocks_used"] == 0
        assert counters["generated_tokens"] >= sum(len(tokens) for tokens in server.tokens.values())
        children = server.children()
        assert server.end(signal.SIGTERM) == -signal.SIGTERM
        assert [info.state for info in server.infos] == ["starting", "ready", "draining", "stopped"]
        assert_nothing_is_left(folder, children)


def test_the_pool_is_the_smallest_of_all_ranks(folder: Path) -> None:
    with ready_server(folder, {"num_blocks": [50, 30]}, ranks_per_stage=2) as server:
        assert server.infos[-1].kv_tokens == 120
        assert server.infos[-1].max_seq_len == 120
        assert "requests are limited to that instead of 256" in server.log


def test_a_ready_server_can_be_found_and_a_stopped_one_cannot(folder: Path) -> None:
    environ = {"MGPU_RUNTIME_DIR": str(folder / "run")}
    with ready_server(folder) as server:
        found = eventually(lambda: running_servers(environ), "the gateway knows, but nobody else")
        assert [(each.pid, each.model) for each in found] == [(server.process.pid, "fake")]
        server.process.send_signal(signal.SIGTERM)
        server.wait_exit()
    assert running_servers(environ) == []


def test_a_server_without_a_place_for_its_sockets_does_not_say_that_it_stopped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MGPU_RUNTIME_DIR", "/dev/null/run")
    with caplog.at_level("INFO"), pytest.raises(RuntimeDirError, match="no private folder"):
        Server(config()).run()
    assert "stopped" not in caplog.messages


def test_nobody_finds_a_server_whose_gateway_does_not_know_that_it_is_ready(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GATEWAY_SILENT", "1")
    with ready_server(folder) as server:
        assert "listening on" not in server.log
        assert running_servers({"MGPU_RUNTIME_DIR": str(folder / "run")}) == []
        server.socket.send(LINK.encode(StateKnown("ready")))
        server.submit(1, [1, 2, 3], 5)  # by a client that knew the endpoint: not lost with the wait
        server.wait_for(lambda: 1 in server.finish)
        assert server.tokens[1] == solo_tokens([1, 2, 3], 5)
        assert "listening on" in server.log


def test_a_gateway_that_does_not_answer_is_not_waited_for_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GATEWAY_SILENT", "1")
    with running_server(folder, gateway_timeout_s=0.5) as server:
        eventually(lambda: "listening on" in server.log, lambda: server.log, 10)
        assert "the gateway has not answered for 0.5 s" in server.log


def test_two_servers_share_a_machine(folder: Path) -> None:
    other = Path(tempfile.mkdtemp(prefix="mgpu"))
    with running_server(folder) as first, running_server(other) as second:
        for server in (first, second):
            server.wait_ready()
            server.submit(1, [1, 2, 3], 5)
        for server in (first, second):
            server.wait_for(lambda server=server: 1 in server.finish)  # type: ignore[misc]
            assert server.tokens[1] == solo_tokens([1, 2, 3], 5)
    shutil.rmtree(other)


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.01}) as server:
        server.begin(1, [1, 2, 3], 60)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.infos[-1].state == "draining")
        server.submit(2, [1, 2, 3], 60)
        assert server.wait_exit() == -signal.SIGTERM
        assert server.tokens[1] == solo_tokens([1, 2, 3], 60)
        assert server.finish == {1: "length", 2: "error"}
        assert "finishing its last requests" in server.errors[2]


def test_drain_timeout_ends_what_still_runs(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.02}, drain_timeout_s=0.2) as server:
        server.begin(1, [1, 2, 3], 200)
        assert server.end(signal.SIGTERM) == -signal.SIGTERM
        assert server.finish == {1: "error"}
        assert "stopped before this was finished" in server.errors[1]
        assert "the drain timeout of 0.2 s is over: ending 1 sequence" in server.log


def test_second_sigint_stops_at_once(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.02}) as server:
        server.begin(1, [1, 2, 3], 200)
        children = server.children()
        server.process.send_signal(signal.SIGINT)
        server.wait_for(lambda: server.infos[-1].state == "draining")
        assert server.end(signal.SIGINT) == -signal.SIGINT
        assert server.finish == {1: "error"}
        assert "a second signal: ending 1 sequence" in server.log
        assert_nothing_is_left(folder, children)


def test_a_signal_while_loading_stops_the_start(folder: Path) -> None:
    with running_server(folder, {"fail": "hang", "fail_phase": "weights"}) as server:
        server.wait_for(lambda: bool(server.infos))
        children = server.children()
        status = server.end(signal.SIGTERM)
        assert status == -signal.SIGTERM, server.log
        assert_nothing_is_left(folder, children)


def test_a_worker_that_fails_while_loading_ends_the_start(folder: Path) -> None:
    with running_server(folder, {"fail": "raise", "fail_phase": "weights"}) as server:
        assert server.wait_exit() == 1
        assert "worker 0 failed in phase weights: rank 0 was told to fail" in server.log


@pytest.mark.parametrize(
    ("how", "peers_end", "status"), [("raise", "abort", 1), ("mistake", "abort", 78), ("mistake", "exit", 78)]
)
def test_a_peer_that_ends_for_a_lost_rank_is_not_the_cause(folder: Path, how: str, peers_end: str, status: int) -> None:
    options = {"fail": how, "fail_phase": "weights", "peers_end": peers_end}
    with running_server(folder, options, ranks_per_stage=2) as server:
        assert server.wait_exit() == status
        assert "worker 0 failed in phase weights: rank 0 was told to fail" in server.log


def test_workers_that_hang_in_the_first_start_write_their_stacks(folder: Path) -> None:
    with running_server(folder, {"fail": "hang", "fail_phase": "weights"}, start_timeout_s=3.0) as server:
        assert server.wait_exit() == 1
        assert "the new workers have said nothing for 3 s" in server.log
        assert "most recent call first" in server.log


def test_weights_that_cannot_be_read_end_the_start_as_a_mistake_of_the_user(folder: Path) -> None:
    with running_server(folder, {"fail": "mistake", "fail_phase": "weights"}) as server:
        assert server.wait_exit() == 78
        assert "worker 0 failed in phase weights: rank 0 was told to fail" in server.log
        assert "Traceback" not in server.log


def test_a_tokenizer_that_cannot_be_read_ends_the_start_as_a_mistake_of_the_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GATEWAY_MISTAKE", "1")
    with running_server(folder) as server:
        assert server.wait_exit() == 78
        assert "the gateway failed: no usable tokenizer" in server.log


def test_sigkill_of_the_parent_leaves_nothing(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.01}, ranks_per_stage=2) as server:
        server.begin(1, [1, 2, 3], 200)
        children = server.children()
        assert len(children) == 3
        server.process.kill()
        server.wait_exit()
        assert_nothing_is_left(folder, children)


def cpu_seconds(server: ServerProcess) -> float:
    times = psutil.Process(server.process.pid).cpu_times()
    return float(times.user + times.system)


def test_an_idle_server_uses_less_than_one_percent_of_a_core(folder: Path) -> None:
    with ready_server(folder) as server:
        before = cpu_seconds(server)
        assert not server.socket.poll(2000)
        assert round(cpu_seconds(server) - before, 2) <= 0.02  # counted in hundredths
