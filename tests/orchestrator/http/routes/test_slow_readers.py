"""A client that reads less than its stream brings: the stream ends with an error, its request too, and no other one."""

import json
import socket
from http.client import HTTPResponse
from typing import Any

import pytest

from harness.servers.gateway_process import GatewayProcess
from harness.servers.http_process import HttpServer

DEADLINE_S = 60.0
REQUEST = {"max_tokens": 4000, "n": 16, "stream": True, "ignore_eos": True, "temperature": 1}
COMPLETION = {**REQUEST, "prompt": [5, 6], "logprobs": 20}
PROMPTS = {**COMPLETION, "prompt": [[5, 6], [7, 8]], "n": 8}


def begin(server: HttpServer, body: dict[str, Any]) -> socket.socket:
    """Send a request with little room for its answer, and read none of it."""
    data = json.dumps(body).encode()
    head = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\nconnection: close\r\n"
    raw = socket.socket()
    raw.settimeout(DEADLINE_S)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + data)
    return raw


@pytest.mark.parametrize("body", [COMPLETION, PROMPTS], ids=["one prompt", "several prompts"])
def test_a_stream_that_is_not_read_ends_with_slow_reader(
    http: HttpServer, gateway: GatewayProcess, body: dict[str, Any]
) -> None:
    gateway.set_info(max_seq_len=5000)
    with begin(http, body) as raw:
        gateway.engine.wait(lambda: bool(gateway.engine.cancels))
        assert http.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 4}).status == 200
        answer = HTTPResponse(raw)
        answer.begin()
        last = answer.read().rstrip().rpartition(b"data: ")[2]
    error = json.loads(last)["error"]
    assert error["code"] == "slow_reader"
    assert "bytes waited for its reader" in error["message"]
