"""Workers die, hang and lie under a running server: every request goes on where it was, exactly once."""

import random
import signal
import threading
from pathlib import Path

import psutil
import pytest

from harness.assertions import assert_has_all
from harness.servers.fake_model import solo_tokens
from harness.servers.server_process import ServerProcess, ready_server, running_server
from harness.waiting import eventually
from mgpu.orchestrator.engine.step_times import StepTimes
from mgpu.orchestrator.processes.failures import RestartLimit, TooManyRestarts
from mgpu.protocol.internal.gateway_messages import Cancel

LOADED_BYTES = 100
"""Of each fake worker."""
FAILURES = {
    "raise": "worker 1 failed in phase steps: rank 1 was told to fail\nTraceback",
    "exit": "worker 1 failed in phase steps: the process exited with status 7",
    "sigkill": "worker 1 failed in phase steps: the process was killed by signal 9 (SIGKILL)",
    "hang": "the workers hang: no result of a step",
}


class Load:
    """Requests of random shapes, and what each of them must give."""

    def __init__(self, server: ServerProcess, seed: int = 1) -> None:
        self._server = server
        self._rng = random.Random(seed)
        self.expected: dict[int, list[int]] = {}

    def submit(self, count: int, least_tokens: int = 1) -> list[int]:
        """Send requests; return their ids."""
        ids = list(range(len(self.expected), len(self.expected) + count))
        for sequence_id in ids:
            prompt = [self._rng.randrange(900) for _ in range(self._rng.randrange(1, 60))]
            max_tokens = self._rng.randrange(least_tokens, least_tokens + 40)
            self.expected[sequence_id] = solo_tokens(prompt, max_tokens)
            self._server.submit(sequence_id, prompt, max_tokens)
        return ids

    def check(self) -> None:
        """Wait until all have ended: nothing lost, nothing repeated, nothing changed."""
        self._server.wait_for(lambda: self.expected.keys() <= self._server.finish.keys())
        assert {i: self._server.tokens[i] for i in self.expected} == self.expected
        assert {self._server.finish[i] for i in self.expected} <= {"length"}


def serve(server: ServerProcess, count: int, least_tokens: int = 1) -> None:
    load = Load(server)
    load.submit(count, least_tokens)
    load.check()


def kill_a_worker_under(server: ServerProcess) -> Load:
    """Let requests run, and kill a worker when the first of them has a token."""
    server.wait_ready()
    load = Load(server)
    ids = load.submit(4, least_tokens=20)
    server.wait_for(lambda: bool(server.tokens.get(ids[0])))
    server.workers()[0].kill()
    return load


def states(server: ServerProcess) -> list[str]:
    return [info.state for info in server.infos]


@pytest.mark.parametrize(
    ("how", "num_stages", "ranks_per_stage"),
    [("sigkill", 1, 2), ("sigkill", 2, 1), ("exit", 1, 2), ("raise", 2, 1), ("hang", 2, 1)],
)
def test_requests_go_on_after_a_worker_failed(folder: Path, how: str, num_stages: int, ranks_per_stage: int) -> None:
    # Without collectives only the rank that reports results can hold up the others.
    rank = num_stages - 1 if how == "hang" else 1
    options = {"fail": how, "fail_rank": rank, "fail_phase": "steps", "fail_step": 12, "fail_epochs": [0]}
    options |= {"stale": True, "step_s": 0.005}
    layout = {"num_stages": num_stages, "ranks_per_stage": ranks_per_stage}
    with ready_server(folder, options, **layout, hang_timeout_s=1.0 if how == "hang" else 10.0) as server:
        serve(server, 12, least_tokens=30)
        assert states(server) == ["starting", "ready", "recovering", "ready"]
        assert FAILURES[how] in server.log
        counters = server.counters()
        assert counters["restarts"] == 1
        assert counters["replays"] >= 1
        assert counters["last_recovery_s"] > 0
        assert counters["loaded_bytes"] == 2 * num_stages * ranks_per_stage * LOADED_BYTES, "by each rank of each group"
        assert counters["kv_blocks_used"] == counters["running"] == 0
        # The stacks of the ranks show where they hang. After a death they would hide its cause.
        assert ("most recent call first" in server.log) == (how == "hang")
        assert server.end(signal.SIGTERM) == -signal.SIGTERM


def test_a_counted_restart_is_never_told_before_the_state_that_goes_with_it(folder: Path) -> None:
    with ready_server(folder, {}, ranks_per_stage=1) as server:
        server.workers()[0].kill()
        server.wait_for(lambda: server.counters()["restarts"] == 1)
        assert "recovering" in states(server)


def test_many_kills_at_any_moment_lose_nothing(folder: Path) -> None:
    rng = random.Random(7)
    with ready_server(folder, {"step_s": 0.002}, ranks_per_stage=2, max_restarts=1000) as server:
        load = Load(server)
        for _ in range(12):
            ids = load.submit(8, least_tokens=20)
            moment = rng.choice([0, 1, rng.randrange(2, 20)])  # before its prompt, at its first token, while it decodes
            server.wait_for(lambda ids=ids, moment=moment: len(server.tokens.get(ids[0], [])) >= moment)  # type: ignore[misc]
            server.workers()[rng.randrange(2)].kill()
            load.submit(2)
            load.check()
        assert server.counters()["restarts"] == 12


def test_the_state_is_told_before_counters_that_know_of_the_restart(folder: Path) -> None:
    with ready_server(folder) as server:
        server.workers()[0].kill()
        counters = eventually(lambda: found if (found := server.counters())["restarts"] else {}, lambda: server.log)
        assert states(server)[2:] == (["recovering", "ready"] if counters["last_recovery_s"] else ["recovering"])


def test_a_kill_of_an_idle_worker_is_repaired_before_the_next_request(folder: Path) -> None:
    with ready_server(folder) as server:
        server.workers()[0].kill()
        server.wait_for(lambda: states(server)[-2:] == ["recovering", "ready"])
        serve(server, 3)
        assert server.counters()["replays"] == 0


def test_a_stopped_worker_is_replaced_within_the_hang_deadline(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.002}, ranks_per_stage=2, hang_timeout_s=1.0) as server:
        load = Load(server)
        ids = load.submit(4, least_tokens=40)
        server.wait_for(lambda: len(server.tokens.get(ids[0], [])) > 5)
        server.workers()[0].send_signal(signal.SIGSTOP)
        load.check()
        assert server.counters()["restarts"] == 1


def test_workers_are_not_blamed_for_a_time_in_which_the_whole_server_was_stopped(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.05}, ranks_per_stage=2, hang_timeout_s=2.0) as server:
        load = Load(server)
        ids = load.submit(4, least_tokens=40)
        server.wait_for(lambda: len(server.tokens.get(ids[0], [])) > 5)
        for process in (psutil.Process(server.process.pid), *server.workers()):
            process.suspend()
        threading.Event().wait(2.5)  # nobody says anything meanwhile
        for process in (*server.workers(), psutil.Process(server.process.pid)):
            process.resume()
        load.check()
        assert server.counters()["restarts"] == 0


def test_what_comes_while_the_workers_load_again_waits_for_them(folder: Path) -> None:
    with ready_server(folder, {"load_s": 1.0}) as server:
        server.workers()[0].kill()
        server.wait_for(lambda: states(server)[-1] == "recovering")
        load = Load(server)
        load.submit(5)
        server.submit(1000, [1, 2], 50)
        server.send(Cancel(1000, "cancelled"))
        counters = server.counters()
        assert (counters["running"], counters["waiting"]) == (0, 5)
        server.wait_for(lambda: server.finish == {1000: "cancelled"})
        load.check()


def test_a_death_while_loading_again_is_one_more_restart(folder: Path) -> None:
    options = {"fail": "sigkill", "fail_rank": 1, "fail_phase": "weights", "fail_epochs": [1, 2], "step_s": 0.002}
    with running_server(folder, options, ranks_per_stage=2) as server:
        kill_a_worker_under(server).check()
        assert server.counters()["restarts"] == 3


def test_workers_that_hang_while_loading_again_are_replaced(folder: Path) -> None:
    options = {"fail": "hang", "fail_phase": "weights", "fail_epochs": [1], "step_s": 0.002}
    with running_server(folder, options, start_timeout_s=3.0) as server:
        kill_a_worker_under(server).check()
        assert server.counters()["restarts"] == 2
        assert "the new workers have said nothing for 3 s" in server.log


def test_too_many_restarts_end_the_server_with_the_cause(folder: Path) -> None:
    options = {"fail": "raise", "fail_phase": "weights", "fail_epochs": [1, 2, 3, 4], "step_s": 0.02}
    with ready_server(folder, options, ranks_per_stage=2) as server:
        children = server.children()
        server.begin(1, [1, 2], 200)
        server.workers()[1].kill()
        assert server.wait_exit() == 1
        assert "giving up after 3 restarts within 600 s" in server.log
        assert "rank 0 was told to fail" in server.log
        assert server.finish == {1: "error"}
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        assert list((folder / "run").iterdir()) == []


def test_workers_that_hang_at_the_restart_limit_write_their_stacks(folder: Path) -> None:
    options = {"fail": "hang", "fail_phase": "steps", "fail_step": 3}
    with ready_server(folder, options, hang_timeout_s=0.5, max_restarts=0) as server:
        server.submit(1, [1, 2], 200)
        assert server.wait_exit() == 1
        assert_has_all(server.log, "giving up after 0 restarts", "the workers hang", "most recent call first")


def test_a_request_that_kills_the_workers_twice_is_failed_and_the_others_are_served(folder: Path) -> None:
    with ready_server(folder, {"poison": 666}) as server:
        server.serve(1000, [1, 666, 2], 5)
        assert server.finish[1000] == "error"
        assert "failed 2 times in a row while they ran this request" in server.errors[1000]
        serve(server, 5)
        assert server.counters()["restarts"] == 2


def test_those_that_ran_beside_a_request_that_kills_the_workers_are_served(folder: Path) -> None:
    with ready_server(folder, {"poison": 666, "step_s": 0.002}) as server:
        load = Load(server)
        load.submit(5)
        server.submit(1000, [1, 666, 2], 5)
        load.check()
        server.wait_for(lambda: 1000 in server.finish)
        assert server.finish[1000] == "error"
        assert server.counters()["restarts"] == 3


def test_a_smaller_pool_after_a_restart_fails_only_what_no_longer_fits(folder: Path) -> None:
    with ready_server(folder, {"late_blocks": [10], "step_s": 0.002}) as server:
        server.submit(1000, [1, 2, 3], 100)
        server.begin(1001, [1, 2, 3], 30)
        server.workers()[0].kill()
        server.wait_for(lambda: server.finish.keys() >= {1000, 1001})
        assert "the KV cache holds only 40 tokens" in server.errors[1000]
        assert server.tokens[1001] == solo_tokens([1, 2, 3], 30)
        assert server.infos[-1].kv_tokens == 40


def test_a_result_that_cannot_be_costs_the_workers_their_lives_but_no_request(folder: Path) -> None:
    with ready_server(folder, {"fail": "garbage", "fail_phase": "steps", "fail_step": 3}) as server:
        serve(server, 4, least_tokens=10)
        assert "result of step 3 does not fit" in server.log


@pytest.mark.parametrize("how", ["sigkill", "exit", "raise"])
def test_the_earliest_failure_is_reported_not_those_that_follow_from_it(folder: Path, how: str) -> None:
    options = {
        "fail": how, "fail_rank": 2, "fail_phase": "steps", "fail_step": 3, "fail_epochs": [0], "peers_fail": True,
    }  # fmt: skip
    with ready_server(folder, options, ranks_per_stage=3) as server:
        serve(server, 1, least_tokens=20)
        assert server.log.count("failed in phase") == 1
        assert "worker 2 failed" in server.log


def test_sigterm_while_the_workers_load_again_still_finishes_what_ran(folder: Path) -> None:
    with ready_server(folder, {"load_s": 0.2, "step_s": 0.002}) as server:
        load = Load(server)
        ids = load.submit(3, least_tokens=20)
        server.wait_for(lambda: bool(server.tokens.get(ids[0])))
        server.workers()[0].kill()
        server.wait_for(lambda: states(server)[-1] == "recovering")
        server.process.send_signal(signal.SIGTERM)
        load.check()
        assert server.wait_exit() == -signal.SIGTERM


def test_the_restart_limit_forgets_what_is_long_ago() -> None:
    times_s = iter([0.0, 1.0, 2.0, 3.0, 601.0])
    limit = RestartLimit(3, 600.0, clock_s=lambda: next(times_s))
    for _ in range(3):
        limit.note(ValueError("x"))
    with pytest.raises(TooManyRestarts, match="giving up after 3 restarts within 600 s; the last cause: x"):
        limit.note(ValueError("x"))
    limit.note(ValueError("x"))
    limit.note(ValueError("x"), is_free=True)
    assert (limit.count, limit.counted) == (5, 4)


def test_a_step_gets_twenty_times_what_its_size_usually_takes() -> None:
    deadline = StepTimes(10.0)
    assert deadline.seconds_for(1) == 60.0  # nothing is known: kernels may be compiled
    deadline.note(1, 0.02)
    assert deadline.seconds_for(1) == 10.0
    assert deadline.seconds_for(512) == pytest.approx(20 * 0.02 * 512)
    deadline.note(512, 2.0)
    assert deadline.seconds_for(600) == 40.0
    assert deadline.seconds_for(64) == 60.0
