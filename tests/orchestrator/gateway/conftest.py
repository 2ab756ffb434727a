"""Fixtures around a real gateway process; helpers are modules beside this file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder
from mgpu import Client


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def shared_gateway(model_folder: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(model_folder) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: GatewayProcess) -> Iterator[GatewayProcess]:
    """A gateway that others have used; it must still be alive and idle afterwards."""
    shared_gateway.engine.reset()
    yield shared_gateway
    shared_gateway.engine.reset()
    shared_gateway.set_info()
    shared_gateway.wait_until_idle()
    assert shared_gateway.process.poll() is None


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[Client]:
    with Client(gateway.endpoint) as client:
        yield client
