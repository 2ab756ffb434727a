"""A gateway with a fake engine, shared by the tests of one file."""

from collections.abc import Iterator

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("tiny-model"))) as gateway:
        yield gateway


@pytest.fixture
def gateway(server: GatewayProcess) -> Iterator[GatewayProcess]:
    server.engine.reset()
    yield server
    server.engine.reset()
    assert server.process.poll() is None
