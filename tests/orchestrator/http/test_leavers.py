"""Whoever submits over HTTP and leaves holds up nobody else: what is sent to the gateway unread is little."""

import json
import socket
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from harness.servers.http_process import HttpServer
from harness.servers.scripted_server import ScriptedServer
from mgpu.orchestrator.http.edge.front_window import SIZE
from mgpu.protocol.internal.http_spec import ApiKey

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path)
    yield server
    server.close()


def submit(server: HttpServer, key: str) -> socket.socket:
    body = json.dumps({"prompt": "x", "max_tokens": 500, "stream": True}).encode()
    head = f"host: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    raw = socket.create_connection(("127.0.0.1", server.port))
    raw.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return raw


def test_a_flood_of_leavers_is_not_sent_on_and_another_key_is(scripted: ScriptedServer) -> None:
    """The gateway reads and says nothing. It has half a window of the leavers, and then the request of another key."""
    keys = [ApiKey(name, sha256(key.encode()).digest()) for name, key in (("alice", ALICE), ("bob", BOB))]
    with HttpServer(scripted.endpoint, api_keys=keys) as server:
        raws = [submit(server, ALICE) for _ in range(100)]
        heard = [scripted.hear() for _ in range(SIZE // 2)]
        assert not scripted.has_message(0.5)
        for raw in raws:
            raw.close()
        heard += [scripted.hear() for _ in range(SIZE // 2)]
        assert not scripted.has_message(0.5)
        assert [each["type"] for each in heard] == ["generate"] * (SIZE // 2) + ["cancel"] * (SIZE // 2)
        with submit(server, BOB):
            assert scripted.hear()["account"] == "bob"
            for each in heard[SIZE // 2 :]:  # they end, so that there is room, and nobody is left to be sent
                numbers = {"prompt_tokens": 1, "completion_tokens": 0, "cached_tokens": 0}
                scripted.say(type="finished", finish_reasons=["cancelled"], **{**numbers, "id": each["id"]})
            assert not scripted.has_message(0.5)
