"""Hostile connections: big and slow heads, smuggling, thousands of them. The next request is served."""

import asyncio
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from unittest.mock import Mock

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from harness.servers.gateway_process import GatewayProcess
from harness.servers.http_process import HttpServer
from mgpu.orchestrator.http.edge.connections import MAX_FRAMING_BYTES, MAX_HEAD_BYTES, MOST_IN_LINE, BoundedProtocol

HEAD_TIMEOUT_S = 0.5
DEADLINE_S = 30.0
MOST = 50
REQUEST = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
WHOLE = REQUEST + b"\r\n"


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


@pytest.mark.parametrize("size", [MAX_HEAD_BYTES, MAX_HEAD_BYTES + 3000])
def test_a_head_that_comes_at_once_has_the_same_bound(impatient: HttpServer, size: int) -> None:
    assert exchange(impatient, REQUEST + b"x: " + b"y" * size + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")


def test_a_head_just_below_the_bound_is_taken(impatient: HttpServer) -> None:
    last = b"connection: close\r\nx: " + b"y" * (MAX_HEAD_BYTES - 200)
    assert exchange(impatient, REQUEST + last + b"\r\n\r\n").startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 "))


async def wait_for_end(_scope: Scope, receive: Receive, _send: Send) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def protocol_of(app: ASGIApp, state: ServerState) -> BoundedProtocol:
    return BoundedProtocol(uvicorn.Config(app, log_config=None), state, {})


def connected(app: ASGIApp, state: ServerState) -> BoundedProtocol:
    protocol = protocol_of(app, state)
    protocol.connection_made(Mock(is_closing=lambda: False, get_write_buffer_size=lambda: 0))
    return protocol


def test_all_of_pipelined_requests_hear_that_their_client_has_left() -> None:
    """Else what writes the first answer meets a closed connection, which is an error of the server in the log."""

    async def pipeline() -> int:
        protocol = connected(wait_for_end, ServerState())
        protocol.data_received(WHOLE * 3)
        await asyncio.sleep(0)
        tasks = set(protocol.tasks)
        protocol.connection_lost(None)
        await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
        return len(tasks)

    assert asyncio.run(pipeline()) == 1, "the others are not begun"


def test_past_the_most_connections_those_end_that_have_sent_no_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "most_connections", 3)

    async def fill() -> list[bool]:
        state = ServerState()
        protocols = [connected(wait_for_end, state) for _ in range(3)]
        protocols[0].data_received(WHOLE)  # waits for the server
        for protocol in protocols[1:]:
            protocol.data_received(POST + b"content-length: 100\r\n\r\n")
        protocols.append(connected(wait_for_end, state))
        protocols[-1].data_received(WHOLE)
        protocols.append(connected(wait_for_end, state))
        ended = [protocol.transport.abort.called for protocol in protocols]  # type: ignore[attr-defined]
        for protocol in protocols:
            protocol.connection_lost(None)
        return ended

    assert asyncio.run(fill()) == [False, True, True, False, False]


@pytest.mark.parametrize("size", [10_000_000, 40_000], ids=["an answer", "the rest of an answer after the end"])
def test_a_client_that_takes_nothing_is_ended(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(BoundedProtocol, "send_timeout_s", 0.3)

    async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"x" * size})

    async def never_read() -> None:
        state = ServerState()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server = await asyncio.get_running_loop().create_server(lambda: protocol_of(answer, state), sock=listener)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(listener.getsockname())
            client.sendall(WHOLE)
            deadline_s = time.monotonic() + DEADLINE_S
            has_begun = False
            while not has_begun or state.connections:
                has_begun = has_begun or bool(state.connections)
                assert time.monotonic() < deadline_s
                await asyncio.sleep(0.01)
        server.close()

    asyncio.run(never_read())


def test_requests_in_line_have_a_bound_and_those_within_are_answered(impatient: HttpServer) -> None:
    within = exchange(impatient, WHOLE * MOST_IN_LINE + REQUEST + b"connection: close\r\n\r\n")
    assert within.count(b"HTTP/1.1 ") == MOST_IN_LINE + 1
    beyond = exchange(impatient, WHOLE * 1000)
    assert beyond.count(b"HTTP/1.1 ") == MOST_IN_LINE + 1
    assert b" 400 " not in beyond


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


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (CHUNKED + b"0\r\n", b"t: x\r\n" * 10_000),
        (REQUEST + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"t: x\r\n" * 10_000),
        (CHUNKED + b"0\r\nt: ", b"x" * 60_000),
        (CHUNKED + b"1;", b"x" * 60_000),
        (WHOLE, b"\r\n" * 30_000),
    ],
    ids=["trailers", "trailers after the answer", "one trailer", "an extension", "empty lines"],
)
def test_what_is_neither_head_nor_body_has_a_bound(impatient: HttpServer, begin: bytes, more: bytes) -> None:
    with connect(impatient) as raw:
        raw.sendall(begin)
        with pytest.raises(OSError, match=r"reset|pipe"):
            send_without_end(raw, more)


def send_without_end(raw: socket.socket, more: bytes) -> None:
    for _ in range(16 * MAX_FRAMING_BYTES // len(more)):
        raw.sendall(more)


def test_trailers_are_not_kept() -> None:
    protocol = object.__new__(BoundedProtocol)
    protocol.headers, protocol._is_in_head = [], False
    protocol.on_header(b"name", b"value")
    assert protocol.headers == []


def test_chunks_of_some_bytes_are_a_body(impatient: HttpServer) -> None:
    chunks = b"".join(b"8\r\n" + b" " * 8 + b"\r\n" for _ in range(50_000))
    answer = exchange(impatient, CHUNKED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + chunks + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 415 ")


def test_a_byte_between_two_requests_does_not_keep_a_connection_for_ever(impatient: HttpServer) -> None:
    with connect(impatient) as raw:
        raw.sendall(WHOLE)
        assert raw.recv(65536).startswith(b"HTTP/1.1 ")
        raw.sendall(b"\r\n")
        raw.settimeout(HEAD_TIMEOUT_S + DEADLINE_S)
        while raw.recv(65536):
            pass


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


UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" + UPGRADE


def statuses(server: HttpServer, *parts: bytes) -> list[int]:
    """Send parts, and at last a request that ends the connection. Return the statuses of all answers."""
    with connect(server) as raw:
        for part in [*parts, REQUEST + b"connection: close\r\n\r\n"]:
            raw.sendall(part)
            time.sleep(0.02)  # so that each is read alone
        received = b"".join(iter(lambda: raw.recv(65536), b""))
    return [int(answer[:3]) for answer in received.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_a_request_that_asks_for_another_protocol_keeps_its_body(
    impatient: HttpServer, chunked: bool, split: bool
) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    head = POST + (b"transfer-encoding: chunked\r\n\r\n" if chunked else b"content-length: %d\r\n\r\n" % len(body))
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    assert statuses(impatient, *([head, body] if split else [head + body])) == [200, 200]


@pytest.mark.parametrize("split", [False, True])
def test_the_body_of_such_a_request_is_no_request(impatient: HttpServer, split: bool) -> None:
    head = POST + b"content-length: %d\r\n\r\n" % len(WHOLE)
    assert statuses(impatient, *([head, WHOLE] if split else [head + WHOLE])) == [400, 200]


def test_what_follows_such_a_request_is_answered(impatient: HttpServer) -> None:
    assert statuses(impatient, (REQUEST + UPGRADE + b"\r\n") * 3 + WHOLE) == [200] * 5
    assert statuses(impatient, b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n" + WHOLE) == [400]
    in_line = exchange(impatient, (REQUEST + UPGRADE + b"\r\n") * 2000)
    assert 1 <= in_line.count(b"HTTP/1.1 200") <= MOST_IN_LINE + 1
