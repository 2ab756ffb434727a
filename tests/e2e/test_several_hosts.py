"""One model on three hosts under a real torchrun: the tokens of one worker, whatever is lost and comes back.

The hosts are network namespaces. Where these cannot be made they are processes side by side, and no link is cut.
"""

from collections.abc import Iterator

import pytest

from bench.hosts.cluster import Cluster
from bench.hosts.network import Loopback, Network, why_not
from harness.models.tiny_models import TinyModel, make_tiny_model
from harness.waiting import eventually
from mgpu import Client

LONG = 120
LAST = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(model: TinyModel) -> Iterator[Cluster]:
    """The first two hosts share layers, and add up by gloo; the third has the last layer."""
    options = ("-n", "0+1:2;2:1", "--device", "cpu", "--host-timeout", "4", "--max-restarts", "99")
    with Loopback() if why_not() else Network(3) as network, Cluster(network, 3, str(model.folder), *options) as hosts:
        hosts.start()
        yield hosts


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoint, silence_timeout_s=240) as client:
        yield client


def test_ranks_of_three_hosts_choose_the_tokens_of_one(cluster: Cluster, client: Client, model: TinyModel) -> None:
    answer = client.generate(model.prompt_ids, max_tokens=8, ignore_eos=True)
    assert list(answer.token_ids) == model.output_ids
    assert "partial sums by gloo, activations between stages by gloo" in cluster.log()


@pytest.mark.timeout(300)
def test_requests_finish_when_a_link_is_cut_and_a_rank_is_killed(
    cluster: Cluster, client: Client, model: TinyModel
) -> None:
    """The link comes back, and torchrun starts the rank again: the next epoch waits for both."""
    has_links = isinstance(cluster.network, Network)
    whole = client.generate(model.prompt_ids, max_tokens=LONG, ignore_eos=True).token_ids
    stream = client.stream(model.prompt_ids, max_tokens=LONG, ignore_eos=True)
    next(stream)
    if has_links:
        cluster.network.cut(LAST)
    try:
        cluster.processes(1, "--join")[-1].kill()
        if has_links:
            eventually(lambda: "nothing was heard of it for 4 s" in cluster.log(), cluster.logs)
    finally:
        if has_links:
            cluster.network.mend(LAST)
    assert stream.completion().token_ids == whole
    assert cluster.recoveries(), cluster.logs()


def test_the_launchers_end_with_the_server(cluster: Cluster) -> None:
    assert cluster.stop() == [0, 0, 0], cluster.logs()
