"""The HTTP process before a real gateway whose engine is a script: nothing computes, all messages are real."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from harness.servers.gateway_process import GatewayProcess
from harness.servers.http_process import HttpServer

if TYPE_CHECKING:
    import openai


@pytest.fixture(scope="module")
def shared_http(shared_gateway: GatewayProcess) -> Iterator[HttpServer]:
    with HttpServer(shared_gateway.endpoint) as server:
        yield server


@pytest.fixture
def http(shared_http: HttpServer, gateway: GatewayProcess) -> Iterator[HttpServer]:
    """An HTTP server without keys that others have used; it must still be alive afterwards."""
    yield shared_http
    assert shared_http.process.exit_status() is None


@pytest.fixture
def openai_client(http: HttpServer, gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's client, of a server with room for descriptions of tools."""
    gateway.set_info(max_seq_len=4000)
    import openai  # takes a second: only where it is used, not in every process that collects tests

    with openai.OpenAI(base_url=f"{http.url}/v1", api_key="none", max_retries=0) as client:
        yield client
