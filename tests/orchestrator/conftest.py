"""What the tests of this folder share: a folder for a server, and a real gateway before a scripted engine."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: unix sockets have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="mgpu"))
    yield path
    shutil.rmtree(path, ignore_errors=True)  # the orphans of a killed server remove their files at the same time


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
