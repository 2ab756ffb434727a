"""Hostile connections: big and slow heads, smuggling, thousands of them. The next request is served."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from harness.gateway_process import GatewayProcess
from harness.http_process import HttpServer

HEAD_TIMEOUT_S = 0.5
DEADLINE_S = 30.0
MOST = 50
REQUEST = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def impatient(shared_gateway: GatewayProcess) -> Iterator[HttpServer]:
    with HttpServer(shared_gateway.endpoint, head_timeout_s=HEAD_TIMEOUT_S, max_connections=MOST) as server:
        yield server
        assert server.get("/health").status == 200


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S)


def exchange(server: HttpServer, data: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes the connection."""
    with connect(server) as raw:
        raw.sendall(data)
        received = b""
        try:
            while piece := raw.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
        return received


@pytest.mark.parametrize("data", [b"", b"GET / HT", REQUEST, REQUEST + b"x-slow: "])
def test_a_head_that_does_not_come_ends_its_connection(impatient: HttpServer, data: bytes) -> None:
    began_s = time.monotonic()
    answer = exchange(impatient, data)
    assert time.monotonic() - began_s < HEAD_TIMEOUT_S + 10
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


def test_a_head_that_comes_byte_by_byte_ends_too(impatient: HttpServer) -> None:
    with connect(impatient) as raw:
        raw.settimeout(0.01)  # the pause between two bytes
        for byte in REQUEST + b"x-slow: " + b"y" * 3000:
            raw.send(bytes([byte]))
            with suppress(TimeoutError):
                assert raw.recv(100).startswith(b"HTTP/1.1 408 ")
                return
    pytest.fail("it went on for 30 s")


@pytest.mark.parametrize("head", [b"x: " + b"y" * 200_000, b"".join(b"x%d: y\r\n" % at for at in range(20_000))])
def test_a_large_head_is_refused(impatient: HttpServer, head: bytes) -> None:
    assert exchange(impatient, REQUEST + head).startswith(b"HTTP/1.1 431 ")


POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"content-length: 4\r\ncontent-length: 5\r\n\r\n{}  ",
        POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length : 2\r\n\r\n{}",
        b"GET /health\x00 HTTP/1.1\r\n\r\n",
        b"GET http://[/ HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        bytes(range(256)) * 4,
    ],
)
def test_what_is_no_plain_request_is_refused_once(impatient: HttpServer, data: bytes) -> None:
    answer = exchange(impatient, data)
    assert answer.count(b"HTTP/1.1 ") <= 1, "a second request was smuggled in"
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 ")), answer


def test_past_the_most_connections_idle_ones_make_room(impatient: HttpServer) -> None:
    with ExitStack() as opened:
        for _ in range(3 * MOST):
            opened.enter_context(connect(impatient))
        assert impatient.get("/health").status == 200


def test_ten_thousand_connections_are_taken(shared_gateway: GatewayProcess) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = min(10_000, hard - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, number + 200), hard))
    try:
        with HttpServer(shared_gateway.endpoint) as server, ExitStack() as opened:
            for _ in range(number):
                opened.enter_context(connect(server))
            assert server.get("/health").status == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
