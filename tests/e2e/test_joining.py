"""Joining a server over tcp, process by process, with workers that need no torch: refusals, losses, and the end."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.hosts.network import why_not
from harness.models.model_files import LLAMA_CONFIG, write_llama_folder
from harness.ranks.joined_hosts import (
    JoinedServer,
    as_host,
    joined_server,
    make_keys,
    pod_environment,
    srun_environment,
)
from harness.waiting import eventually
from mgpu import Client
from mgpu.launch.commands.install.keygen import make_client

PROMPT = [*range(3, 20)]
SLOW = {"FAKE_WORKER": '{"step_s": 0.01}'}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_llama_folder(folder)
    return folder


@pytest.fixture(scope="module")
def joined(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JoinedServer]:
    """Two hosts with a stage each. Silence counts soon, and no number of losses ends the server."""
    options = ("-n", "0:1;1:1", "--host-timeout", "4", "--max-restarts", "99")
    with joined_server(tmp_path_factory.mktemp("joined"), model, *options) as server:
        yield server


def test_a_host_whose_key_is_not_on_the_list_is_refused(joined: JoinedServer) -> None:
    make_client(joined.folder / "keys", "laptop")  # may send requests, but not see those of others
    host = joined.start(0, 2, "--keys", str(joined.folder / "keys" / "laptop.client"))
    assert host.status() == 78
    assert "refuses this host's key" in host.log()
    assert "keygen --worker NAME" in host.log()
    eventually(lambda: "is not in workers/ of --keys" in joined.server.output(), joined.server.output)


def test_a_host_with_the_keys_of_another_server_says_so(joined: JoinedServer, tmp_path: Path) -> None:
    host = joined.start(0, 2, "--keys", str(make_keys(tmp_path / "keys") / "host.worker"), "--join-timeout", "2")
    assert host.status() == 1
    assert "something accepts connections there, but it is no server with the key" in host.log()


def test_a_host_whose_head_does_not_run_says_so(joined: JoinedServer) -> None:
    host = joined.start(0, 2, "--join", "tcp://127.0.0.1:1", "--join-timeout", "1")
    assert host.status() == 1
    assert "no answer from tcp://127.0.0.1:1" in host.log()
    assert "nothing accepts connections there" in host.log()


def test_a_host_with_another_model_is_refused_by_its_name(joined: JoinedServer, tmp_path: Path) -> None:
    write_llama_folder(tmp_path, config=LLAMA_CONFIG | {"rope_theta": 5.0})
    host = joined.start(0, 2, "-m", str(tmp_path))
    assert host.status() == 78
    for text in (host.log(), joined.server.output()):
        assert f"rank 0 on host {socket.gethostname()} (process {host.process.pid}): its model in {tmp_path}" in text


def test_a_rank_that_has_joined_is_refused_a_second_time(joined: JoinedServer) -> None:
    first = joined.start(0, 2, **SLOW)
    eventually(lambda: "joined: rank 0" in joined.server.output(), first.log)
    second = joined.start(0, 2)
    assert second.status() == 78
    assert f"has joined already, as process {first.process.pid} on host" in second.log()
    other_world = joined.start(1, 3)
    assert other_world.status() == 78
    assert "its WORLD_SIZE is 3, and that of this server is 2" in other_world.log()


@pytest.fixture(scope="module")
def ready(joined: JoinedServer) -> Iterator[Client]:
    """A client of the server, whose two ranks have joined: the first in the test before, the second as by srun."""
    joined.start(1, 2, **SLOW, **srun_environment(1, 2))
    with Client(joined.server.wait_ready()) as client:
        yield client


def start_pod(joined: JoinedServer) -> None:
    """Start the second rank again, where possible as a pod of a StatefulSet, which has nothing but its host's name."""
    if why_not():
        joined.start(1, 2, **SLOW)
    else:
        joined.start(1, 2, before=as_host("workers-1"), **SLOW, **pod_environment(2))
        eventually(lambda: "joined: rank 1 on host workers-1" in joined.server.output(), joined.server.output)


def worker_of(joined: JoinedServer, at: int) -> psutil.Process:
    return eventually(lambda: psutil.Process(joined.hosts[at].process.pid).children())[0]


def restarts(client: Client) -> int:
    return int(client.stats()["restarts"])


@pytest.mark.parametrize("what", ["worker", "host", "silence"])
@pytest.mark.timeout(240)
def test_requests_finish_when_a_rank_is_lost_and_comes_back(joined: JoinedServer, ready: Client, what: str) -> None:
    whole = ready.generate(PROMPT, max_tokens=80, ignore_eos=True).token_ids
    before, host = restarts(ready), joined.hosts[-1]
    streams = [ready.stream(PROMPT, max_tokens=80, ignore_eos=True) for _ in range(4)]
    for stream in streams:
        next(stream)
    worker = worker_of(joined, -1)
    if what == "worker":
        worker.kill()
    elif what == "host":
        host.process.kill()
        eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
        # Another host may take the rank once its own is known to be lost.
        lost = f"(process {host.process.pid}) is lost"
        eventually(lambda: lost in joined.server.output(), joined.server.output)
        start_pod(joined)
    else:
        os.kill(host.process.pid, signal.SIGSTOP)
        try:
            eventually(lambda: "nothing was heard of it for 4 s" in joined.server.output(), joined.server.output)
        finally:
            os.kill(host.process.pid, signal.SIGCONT)
    assert [stream.completion().token_ids for stream in streams] == [whole] * 4, host.log()
    assert restarts(ready) > before


def test_the_end_of_the_server_ends_all_hosts(joined: JoinedServer, ready: Client) -> None:
    workers = [worker_of(joined, -1)]
    joined.server.stop()
    assert joined.hosts[-1].status() == 0
    assert "the server has stopped" in joined.hosts[-1].log()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_ranks_that_do_not_come_end_the_start_with_what_to_type(model: Path, tmp_path: Path) -> None:
    with joined_server(tmp_path, model, "--join-timeout", "6") as server:
        host = server.start(1, 2)
        assert server.server.process.wait(60) == 75
        assert "rank 0 of 2 has not joined" in server.server.output()
        assert f"(joined: rank 1 on host {socket.gethostname()}" in server.server.output()
        assert host.status() == 1
        assert "the server has failed: rank 0 of 2 has not joined" in host.log()
