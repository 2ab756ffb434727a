"""Several copies of a model behind one endpoint: a death, a roll and the end cost no client anything."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from harness.waiting import eventually
from mgpu import Client
from mgpu.launch.server_process import ServerProcess

PROMPT = "Once upon a time"
SAMPLED = {"max_tokens": 200, "ignore_eos": True, "temperature": 1, "seed": 7}


@pytest.fixture(scope="module")
def replicas(text_model: str) -> Iterator[ServerProcess]:
    with ServerProcess("-m", text_model, "--device", "cpu", "--max-seq-len", "1024", "--replicas", "2") as server:
        server.wait_ready()
        yield server


def is_alive(process: psutil.Process) -> bool:
    """A zombie is gone too: it waits for whoever adopted it, and holds nothing."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def copies_of(server: ServerProcess) -> list[psutil.Process]:
    return [each for each in psutil.Process(server.process.pid).children() if "serve" in each.cmdline()]


@pytest.mark.timeout(240)
def test_a_copy_that_is_killed_costs_no_token_and_comes_back(replicas: ServerProcess) -> None:
    with Client(replicas.wait_ready()) as client:
        whole = client.generate(PROMPT, **SAMPLED).token_ids
        streams = [client.stream(PROMPT, **SAMPLED) for _ in range(4)]
        for stream in streams:
            next(stream)
        copies_of(replicas)[0].kill()
        assert [stream.completion().token_ids for stream in streams] == [whole] * 4
        eventually(lambda: client.stats()["replicas_ready"] == 2, client.stats, 120)
        assert client.stats()["copies_restarts"] == 1
        assert len(copies_of(replicas)) == 2


@pytest.mark.timeout(240)
def test_a_router_that_is_killed_costs_no_token(replicas: ServerProcess) -> None:
    with Client(replicas.wait_ready()) as client:
        whole = client.generate(PROMPT, **SAMPLED).token_ids
        streams = [client.stream(PROMPT, **SAMPLED) for _ in range(4)]
        for stream in streams:
            next(stream)
        children = psutil.Process(replicas.process.pid).children()
        next(each for each in children if each.cmdline()[-1] == "mgpu.orchestrator.router").kill()
        assert [stream.completion().token_ids for stream in streams] == [whole] * 4
        assert client.stats()["router_restarts"] == 1


@pytest.mark.timeout(240)
def test_a_roll_refuses_no_request(replicas: ServerProcess) -> None:
    endpoint = replicas.wait_ready()
    before = {each.pid for each in copies_of(replicas)}
    roll = [sys.executable, "-m", "mgpu.launch.cli", "roll", "--endpoint", endpoint, "--timeout", "200"]
    with Client(endpoint) as client, subprocess.Popen(roll, env=replicas.environ) as rolling:
        while rolling.poll() is None:
            assert len(client.generate(PROMPT, max_tokens=5, ignore_eos=True).token_ids) == 5
        assert rolling.returncode == 0
        assert client.stats()["copies_started_again"] == 2
    assert before.isdisjoint(each.pid for each in copies_of(replicas))


@pytest.mark.timeout(240)
def test_nothing_is_left_when_the_router_is_killed(replicas: ServerProcess) -> None:
    family = psutil.Process(replicas.process.pid).children(recursive=True)
    os.kill(replicas.process.pid, signal.SIGKILL)
    replicas.process.wait(10)
    eventually(lambda: not any(map(is_alive, family)), lambda: family, 30)
    left = lambda: [path for path in replicas.runtime_base.rglob("*") if path.name != "log"]  # noqa: E731
    eventually(lambda: not left(), left, 30)
