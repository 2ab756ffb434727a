"""The gateway dies under a running server: the engine goes on, and clients get the rest of their answers, once."""

import random
import signal
import threading
from array import array
from pathlib import Path

import psutil
import pytest

from harness.servers.fake_model import solo_tokens
from harness.servers.gateway_loss import REAL_GATEWAY, SESSION, endpoint_of, gateway_of, lose_the_gateway, resumable
from harness.servers.server_process import DEADLINE_S, ServerProcess, ready_server, running_server
from harness.waiting import eventually
from mgpu import Client
from mgpu.protocol.internal.gateway_messages import RecordQuery, Resumable, WakeUp


def test_sockets_of_those_that_were_replaced_are_removed(folder: Path) -> None:
    with ready_server(folder) as server:

        def sockets() -> list[str]:
            return sorted(path.name for path in (folder / "run").rglob("*-*") if path.is_socket())

        assert sockets() == ["link-0", "worker-0-0"]
        lose_the_gateway(server)
        assert sockets() == ["link-1", "worker-0-0"]
        server.children_like("harness.servers.fake_worker")[0].kill()
        server.wait_for(lambda: "worker-0-0" not in sockets() and len(sockets()) == 2)
        assert sockets() == ["link-1", "worker-1-0"]


class Streams:
    """16 clients, each in its thread, that stream one request after another and compare every token."""

    def __init__(self, endpoint: str, seed: int) -> None:
        self.done = 0
        self.failures: list[str] = []
        self._endpoint = endpoint
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(random.Random(seed + i),)) for i in range(16)]

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in self._threads)

    def wait_for_more(self, count: int, server: ServerProcess) -> None:
        goal = self.done + count
        eventually(lambda: self.done >= goal or self.failures, "the streams stand still", DEADLINE_S)
        assert self.failures == [], server.log

    def _run(self, rng: random.Random) -> None:
        with Client(self._endpoint) as client:
            while not self._stop.is_set() and not self.failures:
                prompt = [rng.randrange(1000) for _ in range(rng.randrange(1, 40))]
                max_tokens = rng.randrange(1, 80)
                try:
                    pieces = list(client.stream(prompt, max_tokens=max_tokens, ignore_eos=True))
                except Exception as error:
                    self.failures.append(repr(error))
                    return
                tokens = [token for piece in pieces for token in piece.token_ids]
                if tokens != solo_tokens(prompt, max_tokens):
                    self.failures.append(f"{prompt} {max_tokens}: {tokens}")
                self.done += 1


@pytest.mark.parametrize(
    ("order", "message"), [(b"die", "the process exited with status 9"), (b"fail", "told to fail")]
)
def test_a_request_goes_on_while_the_gateway_is_replaced(folder: Path, order: bytes, message: str) -> None:
    with ready_server(folder, {"step_s": 0.002}) as server:
        server.send(resumable(1, [1, 2, 3], 200))
        server.submit(2, [1, 2, 3], 200)
        server.wait_for(lambda: 1 in server.tokens)
        lose_the_gateway(server, order)
        assert f"the gateway failed: {message}" in server.log
        server.tokens.clear()
        server.send(RecordQuery(5, SESSION, 1))
        server.wait_for(lambda: bool(server.records))
        record = server.records[0]
        assert (record.query_id, record.context) == (5, b"context")
        known = array("i", record.sequences[0].token_ids).tolist()
        server.tokens.clear()  # what came before the record is part of it
        if not record.sequences[0].finish:
            server.wait_for(lambda: 1 in server.finish)
        assert known + server.tokens.get(1, []) == solo_tokens([1, 2, 3], 200)
        counters = server.counters()
        assert counters["gateway_restarts"] == counters["gateway_restarts_counted"] == 1
        assert counters["restarts"] == counters["running"] == 0  # request 2 could not be resumed: it has ended
        server.send(RecordQuery(6, SESSION, 99))
        server.wait_for(lambda: len(server.records) == 2)
        assert server.records[1].sequences == []


def test_gateway_and_worker_may_die_while_word_of_a_request_is_under_way(folder: Path) -> None:
    """What the gateway has still said is read when it is replaced: by then there is nobody to wake for it."""
    with ready_server(folder, device_kind="cuda") as server:
        server.process.send_signal(signal.SIGSTOP)
        worker = server.workers()[0]
        worker.kill()
        server.socket.send(b"fail")
        for _ in range(100):
            server.send(WakeUp())
        eventually(lambda: worker.status() == psutil.STATUS_ZOMBIE, "the worker lives")
        known = len(server.infos)
        server.process.send_signal(signal.SIGCONT)
        server.wait_for(lambda: any(info.state == "ready" for info in server.infos[known:]))
        server.serve(1, [1, 2, 3], 5)
        assert server.tokens[1] == solo_tokens([1, 2, 3], 5)
        counters = server.counters()
        assert counters["restarts"] == counters["gateway_restarts"] == 1


def test_requests_that_nobody_comes_back_for_end(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.02}, resume_timeout_s=0.3) as server:
        for request_id in (1, 2):
            server.send(resumable(request_id, [1, 2, request_id], 240))
        server.wait_for(lambda: server.tokens.keys() >= {1, 2})
        lose_the_gateway(server)
        server.send(RecordQuery(5, SESSION, 2))
        server.wait_for(lambda: server.finish.get(1) == "cancelled")
        assert 2 not in server.finish
        server.wait_for(lambda: server.finish.get(2) == "length")


def test_a_gateway_that_fails_again_and_again_ends_the_server(folder: Path) -> None:
    with ready_server(folder, max_restarts=2) as server:
        children = server.children()
        for _ in range(2):
            lose_the_gateway(server)
        server.socket.send(b"die")
        assert server.wait_exit() == 1
        assert "giving up after 2 restarts within 600 s" in server.log
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


def test_a_request_is_not_started_twice_under_one_name(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.002}) as server:
        server.send(resumable(1, [1, 2], 100))
        again = resumable(2, [1, 2], 100)
        server.send(Resumable(SESSION, 1, again.context, again.submits))
        server.wait_for(lambda: 1 in server.finish)
        assert server.finish[2] == "error"
        assert "resume it" in server.errors[2]
        assert server.tokens[1] == solo_tokens([1, 2], 100)
        server.send(Resumable(SESSION, 1, b"", resumable(3, [5], 4).submits))  # it has ended: the name is free again
        server.wait_for(lambda: 3 in server.finish)
        assert server.tokens[3] == solo_tokens([5], 4)


@pytest.mark.parametrize(("bind", "kills"), [("", 8), ("tcp://127.0.0.1:0", 4)])
def test_16_streams_survive_kills_of_the_gateway_and_the_workers(folder: Path, bind: str, kills: int) -> None:
    options = {"step_s": 0.002, "num_blocks": [400, 400]}
    with running_server(
        folder, options, ranks_per_stage=2, gateway_command=REAL_GATEWAY, max_restarts=1000, max_rows=32, bind=bind
    ) as server:
        rng = random.Random(3)
        with Streams(endpoint_of(server, folder), seed=11) as streams:
            for number in range(kills):
                streams.wait_for_more(rng.randrange(1, 40), server)
                gateway_of(server).kill()
                if number % 4 == 3:
                    server.workers()[rng.randrange(2)].kill()
                streams.wait_for_more(40, server)
        assert streams.failures == [], server.log
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE_S) == -signal.SIGTERM
