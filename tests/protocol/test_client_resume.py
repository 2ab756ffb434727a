"""A client whose server is too busy to resume its answers."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from mgpu import Client
from mgpu.protocol import wire

DEADLINE_S = 20.0


@pytest.mark.parametrize("code", ["overloaded", "not_ready"])
def test_a_resume_that_is_refused_for_now_is_sent_again(tmp_path: Path, code: str) -> None:
    with scripted_server(tmp_path) as server, Client(f"ipc://{tmp_path}/front", timeout_s=DEADLINE_S) as client:
        stream = client.stream([1])
        connection, _ = hear(server)
        say(server, connection, type="tokens", id=1, index=0, text="a", token_ids=[5])
        assert next(stream).text == "a"
        client._connection._on_event(zmq.EVENT_DISCONNECTED, 0)
        client._connection._on_event(zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)
        resumes = [hear(server)[1]]
        say(server, connection, type="failed", id=1, code=code, message="later", retry_after_s=0.01)
        with ThreadPoolExecutor(1) as pool:
            resumes_again = pool.submit(hear_and_finish, server)
            assert [piece.text for piece in stream] == ["b"]
        resumes.append(resumes_again.result())
    assert resumes[0] == resumes[1]
    assert (resumes[0]["type"], resumes[0]["offsets"]) == ("resume", [1])


def hear_and_finish(server: "zmq.Socket[bytes]") -> dict[str, Any]:
    """Take one message, then resume and end request 1."""
    connection, message = hear(server)
    say(server, connection, type="resumed", id=1)
    say(server, connection, type="tokens", id=1, index=0, text="b", token_ids=[6], finish_reason="stop")
    counts = {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0}
    say(server, connection, type="finished", id=1, finish_reasons=["stop"], **counts)
    return message


@contextlib.contextmanager
def scripted_server(folder: Path) -> "Iterator[zmq.Socket[bytes]]":
    """Bind a socket that says what a test wants."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(f"ipc://{folder}/front")
    try:
        yield socket
    finally:
        socket.close()
        context.term()


def hear(server: "zmq.Socket[bytes]") -> tuple[bytes, dict[str, Any]]:
    """Take one message and give it with the connection it came on."""
    assert server.poll(int(DEADLINE_S * 1000)), "nothing came in time"
    connection, *frames = server.recv_multipart()
    return connection, {str(name): value for name, value in wire.unpack(frames, wire.FROM_CLIENT).items()}


def say(server: "zmq.Socket[bytes]", connection: bytes, **fields: object) -> None:
    server.send_multipart([connection, *wire.pack(fields)])
