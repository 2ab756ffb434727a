"""Clients that resume: servers that are too busy, that are replaced again and again, and that answer twice."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from harness.servers.scripted_server import DEADLINE_S, ScriptedServer
from mgpu import Client

T = TypeVar("T")
Answer = TypeVar("Answer")
LOST_AND_MADE_AGAIN = [(zmq.EVENT_DISCONNECTED, 0), (zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ScriptedServer]:
    with closing(ScriptedServer(tmp_path)) as server:
        yield server


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.endpoint, timeout_s=DEADLINE_S) as client:
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
