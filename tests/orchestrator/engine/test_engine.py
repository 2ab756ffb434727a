"""The step loop with real processes around it: what one request can and cannot do to the others."""

import random
import shutil
import signal
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.fake_model import solo_tokens
from harness.servers.server_process import ServerProcess, ready_server
from mgpu.orchestrator.engine.engine import LONGEST_SLEEP_S
from mgpu.protocol.internal.gateway_messages import LINK, Cancel, Outputs, StatsQuery, Submit, WakeUp
from mgpu.protocol.internal.worker_messages import RowSampling


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    yield from serving({"logprobs": True})


@pytest.fixture(scope="module")
def slow_server() -> Iterator[ServerProcess]:
    """Requests of it are still running when the next message comes, however busy the machine is."""
    yield from serving({"step_s": 0.01})


def serving(options: dict[str, object]) -> Iterator[ServerProcess]:
    folder = Path(tempfile.mkdtemp(prefix="mgpu"))
    with ready_server(folder, options) as server:
        yield server
        assert server.end(signal.SIGTERM) == -signal.SIGTERM
        assert "Traceback" not in server.log
    shutil.rmtree(folder)


def check_still_serves(server: ServerProcess, sequence_id: int) -> None:
    server.serve(sequence_id, [1, 2, 3], 5)
    assert server.tokens[sequence_id] == solo_tokens([1, 2, 3], 5)


@pytest.mark.parametrize(("data", "max_tokens", "error"), [
    (b"", 1, "not a list of int32"),
    (b"\0" * 7, 1, "not a list of int32"),
    (array("i", [1000]).tobytes(), 1, "between 0 and 999"),
    (array("i", [-5]).tobytes(), 1, "between 0 and 999"),
    (array("i", [1] * 250).tobytes(), 7, "exceeds the context of 256 tokens; ask for at most 6"),
    (array("i", [1] * 256).tobytes(), 1, "shorten the prompt to at most 255"),
    (array("i", [1]).tobytes(), 0, "must be at least 1"),
])  # fmt: skip
def test_a_request_that_cannot_run_is_refused_and_the_next_is_served(
    server: ServerProcess, data: bytes, max_tokens: int, error: str
) -> None:
    sequence_id = 1000 + len(server.finish)
    server.send(Submit(sequence_id, data, max_tokens, [], RowSampling(), b"", 0))
    server.wait_for(lambda: sequence_id in server.finish)
    assert server.finish[sequence_id] == "error"
    assert error in server.errors[sequence_id]
    check_still_serves(server, sequence_id + 100_000)


def test_a_refusal_does_not_wait_until_something_else_happens(server: ServerProcess) -> None:
    began_s = time.monotonic()
    for sequence_id in range(910_000, 910_006):
        server.send(Submit(sequence_id, b"", 1, [], RowSampling(), b"", 0))
        server.wait_for(lambda sequence_id=sequence_id: sequence_id in server.finish)
    assert time.monotonic() - began_s < 5 * LONGEST_SLEEP_S


def test_a_request_id_in_use_is_not_started_twice(slow_server: ServerProcess) -> None:
    server = slow_server
    for _ in range(2):
        server.submit(1, [4, 5], 50)
    check_still_serves(server, 2)
    server.wait_for(lambda: 1 in server.finish)
    assert server.tokens[1] == solo_tokens([4, 5], 50)


def test_cancelling_gives_the_reason_as_the_ending(slow_server: ServerProcess) -> None:
    server = slow_server
    server.send(Cancel(12345, "cancelled"))
    server.begin(10, [1], 200)
    server.send(Cancel(10, "stop"))
    server.wait_for(lambda: 10 in server.finish)
    assert server.finish[10] == "stop"
    assert server.tokens[10] == solo_tokens([1], len(server.tokens[10]))


def test_a_flood_of_requests_with_cancels_ends_each_of_them_once(server: ServerProcess) -> None:
    rng = random.Random(5)
    ids = range(5000, 5200)
    prompts = {i: [rng.randrange(1000) for _ in range(rng.randrange(1, 60))] for i in ids}
    lengths = {i: rng.randrange(1, 60) for i in ids}
    for i in ids:
        server.submit(i, prompts[i], lengths[i])
        if i % 3 == 0:
            server.send(Cancel(rng.randrange(5000, i + 1), "cancelled"))
    server.wait_for(lambda: all(i in server.finish for i in ids))
    for i in ids:
        solo = solo_tokens(prompts[i], lengths[i])
        assert server.tokens[i] == solo[: len(server.tokens[i])]
        assert server.finish[i] == "cancelled" or server.tokens[i] == solo
    server.stats.clear()
    server.send(StatsQuery(9))
    server.wait_for(lambda: bool(server.stats))
    assert server.stats[0].query_id == 9
    counters = server.stats[0].counters
    assert counters["running"] == counters["waiting"] == counters["kv_blocks_used"] == 0


def test_logprobs_travel_with_their_tokens(server: ServerProcess) -> None:
    server.submit(20, [1, 2, 3], 3)
    seen: list[tuple[list[int], list[int]]] = []
    while 20 not in server.finish:
        assert server.socket.poll(10_000)
        message = LINK.decode(server.socket.recv())
        server._take(message)
        if isinstance(message, Outputs):
            for tokens, logprobs in zip(message.token_ids, message.logprobs, strict=True):
                seen.append((tokens, [each.top_ids[0] for each in logprobs]))
    assert [tokens for tokens, _ in seen] == [top for _, top in seen] == [[t] for t in solo_tokens([1, 2, 3], 3)]


def test_one_request_does_not_wait_for_all_those_that_another_client_has_queued(slow_server: ServerProcess) -> None:
    prompt = array("i", [3, 1, 4]).tobytes()
    many = range(700_000, 700_100)
    for sequence_id in many:
        slow_server.send(Submit(sequence_id, prompt, 20, [], RowSampling(), b"", 0, account=[1]))
    slow_server.send(Submit(800_000, prompt, 20, [], RowSampling(), b"", 0, account=[2]))
    slow_server.wait_for(lambda: 800_000 in slow_server.finish)
    assert sum(sequence_id in slow_server.finish for sequence_id in many) < 50
    slow_server.wait_for(lambda: all(sequence_id in slow_server.finish for sequence_id in many))
    assert all(slow_server.tokens[sequence_id] == solo_tokens([3, 1, 4], 20) for sequence_id in (*many, 800_000))


def test_beside_gpus_all_are_awake_when_a_request_has_been_read(tmp_path: Path) -> None:
    with ready_server(tmp_path, device_kind="cuda", ranks_per_stage=2) as server:
        for sequence_id in range(1, 4):
            server.send(WakeUp())
            check_still_serves(server, sequence_id)
        server.process.terminate()
        server.wait_exit()  # only rank 0 gives results, so the other one may be some steps behind until then
        assert [server.log.count(f"worker {rank} stays awake") for rank in range(2)] == [3, 3]


def test_on_the_cpu_nobody_is_woken_before_there_is_work(server: ServerProcess) -> None:
    server.send(WakeUp())
    check_still_serves(server, 900_000)
    assert "stays awake" not in server.log
