"""A client of the gateway that tests share; helpers are modules beside this file."""

from collections.abc import Iterator

import pytest

from harness.servers.gateway_process import GatewayProcess
from mgpu import Client


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[Client]:
    with Client(gateway.endpoint) as client:
        yield client
