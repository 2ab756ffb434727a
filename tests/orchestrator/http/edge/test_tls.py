"""HTTPS: connections before their handshake count and have a deadline, so silent ones keep nobody out."""

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from harness.servers.gateway_process import GatewayProcess
from harness.servers.http_process import HttpServer
from mgpu.orchestrator.http.edge.connections import BoundedProtocol
from mgpu.orchestrator.http.edge.tls import TlsHandshake
from mgpu.orchestrator.http.server import new_event_loop

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")

DEADLINE_S = 60.0
MOST = 20
REQUEST = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("certificate")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture(scope="module")
def server(shared_gateway: GatewayProcess, certificate: tuple[Path, Path]) -> Iterator[HttpServer]:
    cert, key = map(str, certificate)
    with HttpServer(shared_gateway.endpoint, tls_cert=cert, tls_key=key, max_connections=MOST) as server:
        yield server
        assert server.process.exit_status() is None


def ask(port: int, cert: Path) -> bytes:
    """Shake hands, send a request and return what comes."""
    context = ssl.create_default_context(cafile=str(cert))
    raw = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    with context.wrap_socket(raw, server_hostname="127.0.0.1") as encrypted:
        encrypted.sendall(REQUEST)
        received = b""
        while piece := encrypted.recv(65536):
            received += piece
    return received


def is_ended(raw: socket.socket) -> bool:
    """Wait for the end of a connection on which nothing comes."""
    try:
        return raw.recv(1) == b""
    except ConnectionResetError:
        return True


def test_silent_connections_make_room_for_those_that_speak_tls(
    server: HttpServer, certificate: tuple[Path, Path]
) -> None:
    with ExitStack() as opened:
        silent = []
        for _ in range(3 * MOST):
            silent.append(opened.enter_context(socket.create_connection(("127.0.0.1", server.port), DEADLINE_S)))
            silent[-1].sendall(b"\x16\x03\x01")  # the beginning of a handshake
        assert ask(server.port, certificate[0]).startswith(b"HTTP/1.1 200 ")
        assert is_ended(silent[0]), "the oldest is still open"


def test_many_requests_over_tls_are_answered(server: HttpServer, certificate: tuple[Path, Path]) -> None:
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as plain:
            plain.sendall(data)  # no TLS
    for _ in range(2 * MOST):
        assert ask(server.port, certificate[0]).startswith(b"HTTP/1.1 200 ")


async def answer(scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, new_event_loop], ids=["asyncio", "uvloop"])
def test_a_handshake_that_does_not_come_ends_its_connection(
    certificate: tuple[Path, Path], new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    state = ServerState()

    def accept() -> TlsHandshake:
        return TlsHandshake(BoundedProtocol(uvicorn.Config(answer, log_config=None), state, {}), context)

    async def serve() -> None:
        listening = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        assert (await asyncio.to_thread(ask, port, certificate[0])).endswith(b"\r\nhttps\r\n0\r\n\r\n")
        monkeypatch.setattr(BoundedProtocol, "head_timeout_s", 0.2)
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as silent:
            assert await asyncio.to_thread(is_ended, silent)
        listening.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())
