"""Workers that an outside launcher starts on several hosts, with a real model: the same tokens as of one worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.joined_hosts import WORKER, JoinedServer, joined_server
from harness.random_model import write_random_model
from mgpu import Client
from mgpu.launch.server_process import ServerProcess

PROMPT = [*range(3, 23)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def joined(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JoinedServer]:
    """Three hosts: the first two share layers, and their sums go by gloo; the third has the last layer."""
    with joined_server(
        tmp_path_factory.mktemp("hosts"), model, "-n", "0+1:2;2:1", "--max-seq-len", "128", nodes=3, module=WORKER
    ) as server:
        for rank in range(3):
            server.start(rank, 3, MASTER_PORT="29533")
        server.server.wait_ready()
        yield server


@pytest.mark.timeout(300)
def test_ranks_of_three_hosts_choose_the_tokens_of_one_worker(joined: JoinedServer, model: Path) -> None:
    with Client(joined.server.wait_ready()) as client:
        answer = client.generate(PROMPT, max_tokens=24, ignore_eos=True).token_ids
    with (
        ServerProcess("-m", str(model), "--device", "cpu", "--max-seq-len", "128") as alone,
        Client(alone.wait_ready()) as client,
    ):
        assert client.generate(PROMPT, max_tokens=24, ignore_eos=True).token_ids == answer
    assert "partial sums by gloo, activations between stages by gloo" in joined.server.output()


def test_hosts_end_with_the_server(joined: JoinedServer) -> None:
    joined.server.stop()
    assert [host.status() for host in joined.hosts] == [0, 0, 0], joined.hosts[0].log()
