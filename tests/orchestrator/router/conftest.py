"""A router in front of two real gateways with scripted engines."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder
from harness.servers.router_thread import RouterThread
from mgpu import Client


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def gateways(model_folder: Path) -> Iterator[list[GatewayProcess]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(GatewayProcess(model_folder)) for _ in range(2)]


@pytest.fixture
def router(gateways: list[GatewayProcess], tmp_path: Path) -> Iterator[RouterThread]:
    thread = RouterThread(f"ipc://{tmp_path}/front", [each.endpoint for each in gateways])
    try:
        thread.wait_until_ready()
        yield thread
    finally:
        thread.end()


@pytest.fixture
def client(router: RouterThread) -> Iterator[Client]:
    with Client(router.endpoint) as client:
        yield client
