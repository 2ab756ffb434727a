"""Clients that resume: servers that are too busy, that are replaced again and again, and that answer twice."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from mgpu import Client
from mgpu.protocol.front import framing

T = TypeVar("T")
Answer = TypeVar("Answer")
DEADLINE_S = 20.0
LOST_AND_MADE_AGAIN = [(zmq.EVENT_DISCONNECTED, 0), (zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)]


class ScriptedServer:
    """Says what a test wants, to the connection on which the last message came."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.bind(f"ipc://{folder}/front")
        self._session = b""

    def wait_for_handshake(self) -> None:
        assert self._monitor.poll(int(DEADLINE_S * 1000)), "nobody connected in time"

    def hear(self) -> dict[str, Any]:
        assert self._socket.poll(int(DEADLINE_S * 1000)), "nothing came in time"
        self._session, *frames = self._socket.recv_multipart()
        return {str(name): value for name, value in framing.unpack(frames, framing.FROM_CLIENT).items()}

    def say(self, **fields: object) -> None:
        """Send a message about request 1."""
        self._socket.send_multipart([self._session, *framing.pack({"id": 1, **fields})])

    def say_tokens(self, *tokens: int, **more: object) -> None:
        self.say(type="tokens", index=0, token_ids=list(tokens), **{"text": "x" * len(tokens), **more})

    def say_the_end(self, token: int, **more: object) -> None:
        self.say_tokens(token, finish_reason="stop", **more)
        self.say(type="finished", finish_reasons=["stop"], prompt_tokens=1, completion_tokens=5, cached_tokens=0)

    def resume_and_finish(self, *tokens: int) -> dict[str, Any]:
        """Take one message, a resume, and answer it with some tokens, the last in a message of its own."""
        message = self.hear()
        self.say(type="resumed", offsets=message["offsets"])
        if tokens[:-1]:
            self.say_tokens(*tokens[:-1])
        self.say_the_end(tokens[-1])
        return message

    def close(self) -> None:
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ScriptedServer]:
    with closing(ScriptedServer(tmp_path)) as server:
        yield server


@pytest.fixture
def client(server: ScriptedServer, tmp_path: Path) -> Iterator[Client]:
    with Client(f"ipc://{tmp_path}/front", timeout_s=DEADLINE_S) as client:
        yield client


def read_while(act: Callable[[], Answer], stream: Iterable[T]) -> tuple[list[T], Answer]:
    """Read a stream to its end while the server acts."""
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        return list(stream), acting.result()


@pytest.mark.parametrize("code", ["overloaded", "not_ready"])
def test_a_resume_that_is_refused_for_now_is_sent_again(server: ScriptedServer, client: Client, code: str) -> None:
    def resume_and_finish() -> dict[str, Any]:
        message = server.hear()
        server.say(type="resumed")
        server.say_the_end(6, text="b")
        return message

    stream = client.stream([1])
    server.hear()
    server.say_tokens(5, text="a")
    assert next(stream).text == "a"
    client._session._on_events(LOST_AND_MADE_AGAIN)
    resume = server.hear()
    server.say(type="failed", code=code, message="later", retry_after_s=0.01)
    pieces, again = read_while(resume_and_finish, stream)
    assert [piece.text for piece in pieces] == ["b"]
    assert resume == again
    assert (resume["type"], resume["offsets"]) == ("resume", [1])


def test_a_server_that_is_replaced_twice_while_nobody_reads_is_asked_once(
    server: ScriptedServer, client: Client, tmp_path: Path
) -> None:
    stream = client.stream([1])
    server.hear()
    server.say_tokens(1, 2)
    assert next(stream).token_ids == (1, 2)
    server.close()
    with closing(ScriptedServer(tmp_path)) as second:
        second.wait_for_handshake()
    with closing(ScriptedServer(tmp_path)) as third:
        third.wait_for_handshake()
        pieces, resume = read_while(lambda: third.resume_and_finish(3, 4, 5), stream)
        assert [piece.token_ids for piece in pieces] == [(3, 4), (5,)]
        assert resume["offsets"] == [2]
        client._session.send_cancel(7)
        assert third.hear() == {"type": "cancel", "id": 7}, "another resume before it"


def test_a_second_answer_with_what_the_first_has_brought_repeats_nothing(
    server: ScriptedServer, client: Client
) -> None:
    stream = client.stream([1])
    server.hear()
    server.say_tokens(1, 2)
    assert next(stream).token_ids == (1, 2)
    for _ in range(3):  # the connections broke before the first two could be sent: all go out on the last one
        client._session._on_events(LOST_AND_MADE_AGAIN)
    for _ in range(3):
        assert server.hear()["offsets"] == [2]
        server.say(type="resumed", offsets=[2])
        server.say_tokens(3, 4)
    pieces, resume = read_while(lambda: server.resume_and_finish(5), stream)
    assert [piece.token_ids for piece in pieces] == [(3, 4), (5,)]
    assert resume["offsets"] == [4]
    assert stream.completion().token_ids == (1, 2, 3, 4, 5)


def test_a_second_resume_that_is_refused_for_now_does_not_end_the_request(
    server: ScriptedServer, client: Client
) -> None:
    stream = client.stream([1])
    server.hear()
    for _ in range(2):
        client._session._on_events(LOST_AND_MADE_AGAIN)
        server.hear()
    server.say(type="resumed", offsets=[0])
    server.say_tokens(1)
    server.say(type="failed", code="overloaded", message="later", retry_after_s=0.01)
    server.say_tokens(2)  # void, as it comes after a resume that has not been answered
    pieces, resume = read_while(lambda: server.resume_and_finish(2), stream)
    assert [piece.token_ids for piece in pieces] == [(1,), (2,)]
    assert resume["offsets"] == [1]


def test_a_request_that_never_arrived_is_sent_again_once(server: ScriptedServer, client: Client) -> None:
    def hear_and_answer() -> dict[str, Any]:
        message = server.hear()
        server.say_the_end(1)
        return message

    stream = client.stream([1])
    generate = server.hear()
    for _ in range(2):
        client._session._on_events(LOST_AND_MADE_AGAIN)
        server.hear()
        server.say(type="failed", code="unknown_request", message="it never arrived")
    pieces, again = read_while(hear_and_answer, stream)
    assert [piece.token_ids for piece in pieces] == [(1,)]
    assert again == generate
