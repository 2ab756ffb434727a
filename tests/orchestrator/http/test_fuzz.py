"""The HTTP server fuzzed by its own OpenAPI document, and other bad input: clear errors, nothing shown, no harm."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http import client as http_client
from typing import Any

import psutil
import pytest

from bench.http.document_fuzz import ALLOWED, FORBIDDEN, HIDDEN, fuzz, operations
from harness.servers.gateway_process import TEMPLATE, GatewayProcess, make_model_folder, says
from harness.servers.http_client import JSON_TYPE, Answer, connection_to
from harness.servers.http_process import HttpServer
from harness.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore")  # of the fuzzer
EXAMPLES = 8
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
GROWTH_BYTES = 64 << 20
HELD_BYTES = 40 << 20


OPERATIONS = (
    (CHAT, "POST"), (TEXT, "POST"), ("/v1/responses", "POST"), ("/v1/messages", "POST"),
    ("/v1/messages/count_tokens", "POST"), ("/tokenize", "POST"), ("/detokenize", "POST"), ("/apply-template", "POST"),
    ("/v1/models", "GET"), ("/v1/models/{name}", "GET"), ("/health", "GET"), ("/status", "GET"), ("/version", "GET"),
    ("/metrics", "GET"), ("/health/ready", "GET"), ("/health/live", "GET"),
)  # fmt: skip
NESTINGS = (
    ("[", "]", 60_000), ("[", "]", 990), ("[", "]", 500), ('{"a":', "}", 60_000), ('[{"a":', "}]", 450),
)  # fmt: skip
CASES = [(*each, kind) for each in OPERATIONS for kind in (ALLOWED, FORBIDDEN) if each[1] == "POST" or kind == ALLOWED]
"""A GET has no body that could be wrong."""


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """A server whose chat template takes every role, as the document does."""
    template = TEMPLATE.replace("message.role == 'tool'", "false")
    folder = make_model_folder(tmp_path_factory.mktemp("lenient"), template)
    with GatewayProcess(folder) as gateway, HttpServer(gateway.endpoint) as server:
        yield server


@pytest.mark.parametrize("path", [path for path, method in OPERATIONS if method == "POST"])
def test_ambiguous_deep_and_endless_bodies_are_a_400_with_a_sentence(lenient: HttpServer, path: str) -> None:
    hostile = [(begin * depth + "1" + end * depth, "nested too deeply") for begin, end, depth in NESTINGS]
    hostile += [('{"a": 1, "a": 2}', "write each field once"), ("1" * 5000, "too many digits")]
    for value, text in hostile:
        for name in ("metadata", "messages", "input", "prompt", "unknown"):
            answer = lenient.post(path, f'{{"{name}": {value}}}'.encode())
            assert (answer.status, text in answer.body.decode()) == (400, True), (name, value[:20], answer.body[:200])


@pytest.fixture(scope="module")
def document(lenient: HttpServer) -> dict[str, Any]:
    found: dict[str, Any] = lenient.get("/openapi.json").json
    return found


def test_the_document_has_the_operations_that_are_fuzzed(document: dict[str, Any]) -> None:
    assert set(operations(document)) == set(OPERATIONS)


@pytest.mark.parametrize(("path", "method", "kind"), CASES)
def test_fuzzed_requests_get_what_the_document_says(
    lenient: HttpServer, document: dict[str, Any], path: str, method: str, kind: str
) -> None:
    """Allowed bodies are answered and forbidden ones refused, so the document and the rules say the same."""
    pytest.importorskip("schemathesis", reason="needs the packages of mgpu[compat]")
    row = fuzz(document, lenient.url, path, method, kind, EXAMPLES, 0)
    assert not row.findings
    answered = row.statuses[200]
    assert answered >= 1 or kind == FORBIDDEN or "{name}" in path, row.statuses
    assert lenient.post(CHAT, HELLO).status == 200


DEEP = b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
WIDE = json.dumps({"messages": [{"role": "user", "content": "x"}] * 2049}).encode()


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"a":' * 50_000,
        WIDE,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}',
        b"\xff\xfe{\x00}\x00",
        b'{"logit_bias": {' + b",".join(b'"%d": 1' % at for at in range(5000)) + b"}}",
        b'{"temperature": 1e999, "messages": []}',
        b'{"max_tokens": ' + b"1" * 4000 + b"}",
        b'{"' + b"x" * 100_000 + b'": 1}',
        json.dumps({f"field{at}": at for at in range(20_000)}).encode(),
        b"null",
        b"",
    ],
)
def test_a_strange_body_is_a_400_that_shows_nothing(http: HttpServer, body: bytes) -> None:
    answer = http.post(CHAT, body)
    assert answer.status == 400
    assert len(answer.error["message"]) < 300
    assert len(answer.headers.get("warning", "")) < 2000
    assert not any(word in answer.body for word in HIDDEN)
    assert http.post(CHAT, HELLO).status == 200


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_100_mib_is_refused_and_its_memory_comes_back(http: HttpServer, chunked: bool) -> None:
    process = psutil.Process(http.process.pid)
    before = process.memory_info().rss
    connection = connection_to(http.url)
    piece = b"x" * (1 << 20)
    with suppress(OSError):  # it may close before all is sent
        if chunked:
            connection.request("POST", CHAT, iter([piece] * 100), JSON_TYPE, encode_chunked=True)
        else:
            connection.request("POST", CHAT, iter([piece] * 100), {**JSON_TYPE, "content-length": str(100 << 20)})
    with suppress(OSError, http_client.HTTPException):
        response = connection.getresponse()
        assert response.status == 413
        assert b"the limit is 4194304" in response.read()
    connection.close()
    eventually(lambda: process.memory_info().rss < before + GROWTH_BYTES, lambda: str(process.memory_info()))
    assert http.post(CHAT, HELLO).status == 200


def test_the_memory_of_bodies_that_never_ended_comes_back(shared_gateway: GatewayProcess) -> None:
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 1048576\r\n\r\n"
    with HttpServer(shared_gateway.endpoint) as server, ExitStack() as opened:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        for _ in range(600):
            raw = opened.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            raw.sendall(head % TEXT.encode() + b" " * 65536)
        eventually(lambda: process.memory_info().rss > before + HELD_BYTES, lambda: str(process.memory_info()))
        assert server.post(CHAT, HELLO).status == 200
        opened.close()
        eventually(lambda: process.memory_info().rss < before + HELD_BYTES // 2, lambda: str(process.memory_info()))


@pytest.mark.parametrize(
    "headers",
    [
        [("content-type", "application/json"), ("content-type", "text/plain")],
        [("content-type", "application/json"), ("authorization", "a"), ("authorization", "b")],
        [("content-type", "application/json; charset=utf-16")],
        [("content-type", "application/json"), ("x-request-id", "a"), ("x-request-id", "b")],
        [("content-type", "application/json"), ("origin", "\xff"), ("host", "\xff")],
    ],
)
def test_doubled_and_strange_headers_do_no_harm(http: HttpServer, headers: list[tuple[str, str]]) -> None:
    connection = connection_to(http.url)
    data = json.dumps(HELLO).encode()
    connection.putrequest("POST", CHAT, skip_host=any(name == "host" for name, _ in headers))
    for name, value in [*headers, ("content-length", str(len(data)))]:
        connection.putheader(name, value.encode("latin-1"))
    connection.endheaders(data)
    response = connection.getresponse()
    answer = Answer(response.status, dict(response.getheaders()), response.read())
    connection.close()
    assert answer.status in (200, 400, 403, 415)
    assert http.post(CHAT, HELLO).status == 200


def test_half_closed_streams_end_and_free_what_they_had(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.going.clear()
    data = json.dumps({"prompt": "x", "max_tokens": 200, "stream": True}).encode()
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", http.port)) as raw:
        raw.sendall(head % (TEXT.encode(), len(data)) + data)
        gateway.engine.wait(lambda: len(gateway.engine.submits) == 1)
        raw.shutdown(socket.SHUT_WR)
        gateway.engine.wait(lambda: len(gateway.engine.cancels) == 1)


def test_a_thousand_clients_that_go_leave_nothing(http: HttpServer, gateway: GatewayProcess) -> None:
    gateway.engine.script = says("x" * 10**6)
    gateway.engine.going.clear()
    opened = []
    data = json.dumps({"prompt": "x", "max_tokens": 200, "stream": True}).encode()
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    for _ in range(1000):
        raw = socket.create_connection(("127.0.0.1", http.port))
        raw.sendall(head % (TEXT.encode(), len(data)) + data)
        opened.append(raw)
    gateway.engine.wait(lambda: len(gateway.engine.submits) == 1000)
    for raw in opened:
        raw.close()
    began_s = time.monotonic()
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 1000)
    assert time.monotonic() - began_s < 30
    gateway.engine.going.set()
    gateway.wait_until_idle()


def test_prompts_are_not_in_the_log(shared_gateway: GatewayProcess, capfd: pytest.CaptureFixture[str]) -> None:
    secret = "xyzzy-plugh"
    with HttpServer(shared_gateway.endpoint) as server:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}
        for change in ({}, {"stream": True}, {"stop": secret}, {"temperature": secret}, {"unknown": secret}):
            server.post(CHAT, {**body, **change})
        server.post(CHAT, json.dumps(body).encode() + b"}")
        server.post(TEXT, {"prompt": secret, "model": secret})
    logged = capfd.readouterr().err
    assert "the field 'unknown' has no effect" in logged
    assert secret not in logged
