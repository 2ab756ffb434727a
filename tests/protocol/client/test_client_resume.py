"""Clients that resume: servers that are too busy, that are replaced again and again, and that answer twice."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from mgpu import Client
from mgpu.protocol.front import framing

DEADLINE_S = 20.0
LOST_AND_MADE_AGAIN = [(zmq.EVENT_DISCONNECTED, 0), (zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)]
COUNTS = {"prompt_tokens": 1, "completion_tokens": 5, "cached_tokens": 0}


@pytest.mark.parametrize("code", ["overloaded", "not_ready"])
def test_a_resume_that_is_refused_for_now_is_sent_again(tmp_path: Path, code: str) -> None:
    with scripted_server(tmp_path) as server, Client(f"ipc://{tmp_path}/front", timeout_s=DEADLINE_S) as client:
        stream = client.stream([1])
        connection, _ = hear(server)
        say(server, connection, type="tokens", id=1, index=0, text="a", token_ids=[5])
        assert next(stream).text == "a"
        client._connection._on_events(LOST_AND_MADE_AGAIN)
        resumes = [hear(server)[1]]
        say(server, connection, type="failed", id=1, code=code, message="later", retry_after_s=0.01)
        with ThreadPoolExecutor(1) as pool:
            resumes_again = pool.submit(hear_and_finish, server)
            assert [piece.text for piece in stream] == ["b"]
        resumes.append(resumes_again.result())
    assert resumes[0] == resumes[1]
    assert (resumes[0]["type"], resumes[0]["offsets"]) == ("resume", [1])


def test_a_server_that_is_replaced_twice_while_nobody_reads_is_asked_once(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/front"
    with scripted_server(tmp_path) as first, Client(endpoint, timeout_s=DEADLINE_S) as client:
        stream = client.stream([1])
        connection, _ = hear(first)
        say_tokens(first, connection, 1, 2)
        assert next(stream).token_ids == (1, 2)
        first.close()
        with scripted_server(tmp_path) as second:
            wait_for_handshake(second)
        with scripted_server(tmp_path) as third:
            wait_for_handshake(third)
            with ThreadPoolExecutor(1) as pool:
                resume = pool.submit(resume_and_finish, third, 3, 4, 5)
                assert [piece.token_ids for piece in stream] == [(3, 4), (5,)]
            assert resume.result()["offsets"] == [2]
            client._connection.send_cancel(7)
            assert hear(third)[1] == {"type": "cancel", "id": 7}, "another resume before it"


def test_a_second_answer_with_what_the_first_has_brought_repeats_nothing(tmp_path: Path) -> None:
    with scripted_server(tmp_path) as server, Client(f"ipc://{tmp_path}/front", timeout_s=DEADLINE_S) as client:
        stream = client.stream([1])
        connection, _ = hear(server)
        say_tokens(server, connection, 1, 2)
        assert next(stream).token_ids == (1, 2)
        for _ in range(3):  # the connections broke before the first two could be sent: all go out on the last one
            client._connection._on_events(LOST_AND_MADE_AGAIN)
        for _ in range(3):
            assert hear(server)[1]["offsets"] == [2]
            say(server, connection, type="resumed", id=1, offsets=[2])
            say_tokens(server, connection, 3, 4)
        with ThreadPoolExecutor(1) as pool:
            resume = pool.submit(resume_and_finish, server, 5)
            assert [piece.token_ids for piece in stream] == [(3, 4), (5,)]
        assert resume.result()["offsets"] == [4]
        assert stream.completion().token_ids == (1, 2, 3, 4, 5)


def test_a_second_resume_that_is_refused_for_now_does_not_end_the_request(tmp_path: Path) -> None:
    with scripted_server(tmp_path) as server, Client(f"ipc://{tmp_path}/front", timeout_s=DEADLINE_S) as client:
        stream = client.stream([1])
        connection, _ = hear(server)
        for _ in range(2):
            client._connection._on_events(LOST_AND_MADE_AGAIN)
            hear(server)
        say(server, connection, type="resumed", id=1, offsets=[0])
        say_tokens(server, connection, 1)
        say(server, connection, type="failed", id=1, code="overloaded", message="later", retry_after_s=0.01)
        say_tokens(server, connection, 2)  # void, as it comes after a resume that has not been answered
        with ThreadPoolExecutor(1) as pool:
            resume = pool.submit(resume_and_finish, server, 2)
            assert [piece.token_ids for piece in stream] == [(1,), (2,)]
        assert resume.result()["offsets"] == [1]


def test_a_request_that_never_arrived_is_sent_again_once(tmp_path: Path) -> None:
    with scripted_server(tmp_path) as server, Client(f"ipc://{tmp_path}/front", timeout_s=DEADLINE_S) as client:
        stream = client.stream([1])
        connection, generate = hear(server)
        for _ in range(2):
            client._connection._on_events(LOST_AND_MADE_AGAIN)
            hear(server)
            say(server, connection, type="failed", id=1, code="unknown_request", message="it never arrived")
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(hear, server)
            say_after = pool.submit(say_the_end, server, connection, again)
            assert [piece.token_ids for piece in stream] == [(1,)]
        say_after.result()
        assert again.result()[1] == generate


def say_the_end(
    server: "zmq.Socket[bytes]", connection: bytes, request: "Future[tuple[bytes, dict[str, Any]]]"
) -> None:
    request.result(DEADLINE_S)
    say_tokens(server, connection, 1, finish_reason="stop")
    say(server, connection, type="finished", id=1, finish_reasons=["stop"], **COUNTS)


def resume_and_finish(server: "zmq.Socket[bytes]", *tokens: int) -> dict[str, Any]:
    """Take one message, a resume, and answer it with some tokens, the last in a message of its own."""
    connection, message = hear(server)
    say(server, connection, type="resumed", id=1, offsets=message["offsets"])
    if tokens[:-1]:
        say_tokens(server, connection, *tokens[:-1])
    say_tokens(server, connection, tokens[-1], finish_reason="stop")
    say(server, connection, type="finished", id=1, finish_reasons=["stop"], **COUNTS)
    return message


def say_tokens(server: "zmq.Socket[bytes]", connection: bytes, *tokens: int, **more: object) -> None:
    say(server, connection, type="tokens", id=1, index=0, text="x" * len(tokens), token_ids=list(tokens), **more)


def wait_for_handshake(server: "zmq.Socket[bytes]") -> None:
    """Wait until a client has connected."""
    assert server.get_monitor_socket().poll(int(DEADLINE_S * 1000)), "nobody connected in time"


def hear_and_finish(server: "zmq.Socket[bytes]") -> dict[str, Any]:
    """Take one message, then resume and end request 1."""
    connection, message = hear(server)
    say(server, connection, type="resumed", id=1)
    say(server, connection, type="tokens", id=1, index=0, text="b", token_ids=[6], finish_reason="stop")
    say(server, connection, type="finished", id=1, finish_reasons=["stop"], **COUNTS)
    return message


@contextlib.contextmanager
def scripted_server(folder: Path) -> "Iterator[zmq.Socket[bytes]]":
    """Bind a socket that says what a test wants."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    socket.bind(f"ipc://{folder}/front")
    try:
        yield socket
    finally:
        monitor.close(linger=0)
        socket.close()
        context.term()


def hear(server: "zmq.Socket[bytes]") -> tuple[bytes, dict[str, Any]]:
    """Return one message with the connection on which it came."""
    assert server.poll(int(DEADLINE_S * 1000)), "nothing came in time"
    connection, *frames = server.recv_multipart()
    return connection, {str(name): value for name, value in framing.unpack(frames, framing.FROM_CLIENT).items()}


def say(server: "zmq.Socket[bytes]", connection: bytes, **fields: object) -> None:
    server.send_multipart([connection, *framing.pack(fields)])
