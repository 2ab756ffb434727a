"""Overloaded servers are asked again; errors and results are of use to an application."""

import asyncio
import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import mgpu
from harness.servers.gateway_process import GatewayProcess, make_model_folder
from harness.servers.scripted_server import DEADLINE_S, ScriptedServer
from mgpu import AsyncClient, Client, Completion, DeadlineExceeded, RequestFailed, ServerStopped, ServerUnreachable


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ScriptedServer]:
    with closing(ScriptedServer(tmp_path)) as server:
        yield server


def refuse(server: ScriptedServer, times: int, code: str = "overloaded") -> int:
    """Refuse a request so many times. Return how often it came."""
    for _ in range(times):
        assert server.hear()["type"] == "generate"
        server.say(type="failed", code=code, message="full", retry_after_s=0.05)
    return times


def refuse_then_answer(server: ScriptedServer, times: int) -> None:
    refuse(server, times)
    assert server.hear()["type"] == "generate"
    server.say_the_end(7)


@pytest.mark.parametrize("times", [1, 10])
def test_an_overloaded_server_is_asked_again(server: ScriptedServer, times: int) -> None:
    with Client(server.endpoint, timeout_s=DEADLINE_S) as client, ThreadPoolExecutor(1) as pool:
        acting = pool.submit(refuse_then_answer, server, times)
        assert client.generate("x").token_ids == (7,)
        acting.result()


def test_an_async_client_asks_an_overloaded_server_again(server: ScriptedServer) -> None:
    async def ask() -> Completion:
        async with AsyncClient(server.endpoint, timeout_s=DEADLINE_S) as client:
            return await client.generate("x")

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(refuse_then_answer, server, 3)
        assert asyncio.run(ask()).token_ids == (7,)
        acting.result()


@pytest.mark.parametrize(("retries", "code", "sent"), [(0, "overloaded", 1), (2, "overloaded", 3), (2, "draining", 1)])
def test_tries_are_bounded_and_only_for_overloaded(server: ScriptedServer, retries: int, code: str, sent: int) -> None:
    with Client(server.endpoint, timeout_s=DEADLINE_S, retries=retries) as client, ThreadPoolExecutor(1) as pool:
        acting = pool.submit(refuse, server, sent, code)
        with pytest.raises(RequestFailed, match="full"):
            client.generate("x")
        assert acting.result() == sent


def test_a_deadline_holds_while_an_overloaded_server_is_asked_again(server: ScriptedServer) -> None:
    with Client(server.endpoint, timeout_s=0.3) as client:
        stream = client.stream("x")
        server.hear()
        server.say(type="failed", code="overloaded", message="full", retry_after_s=30.0)
        with pytest.raises(DeadlineExceeded):
            stream.completion()


def test_a_timeout_brings_what_had_arrived(server: ScriptedServer) -> None:
    with Client(server.endpoint, timeout_s=0.5) as client:
        stream = client.stream("x")
        server.hear()
        server.say_tokens(1, 2)
        with pytest.raises(TimeoutError) as caught:
            stream.completion()
    assert isinstance(caught.value, DeadlineExceeded)
    assert caught.value.partial is not None
    assert (caught.value.partial.text, caught.value.partial.token_ids) == ("xx", (1, 2))


def test_a_server_that_stops_is_a_connection_error(server: ScriptedServer) -> None:
    with Client(server.endpoint, timeout_s=DEADLINE_S) as client:
        stream = client.stream("x")
        server.hear()
        server.say(type="failed", code="stopped", message="the server stops")
        with pytest.raises(ConnectionError, match="stops") as caught:
            stream.completion()
    assert isinstance(caught.value, ServerStopped)
    assert caught.value.code == "stopped"
    assert issubclass(ServerUnreachable, ConnectionError)


@pytest.mark.parametrize(
    "error",
    [
        RequestFailed("overloaded", "full", 2.0),
        ServerStopped("stopped", "ends"),
        ServerUnreachable("gone"),
        DeadlineExceeded("late"),
    ],
)
def test_errors_travel_between_processes(error: Exception) -> None:
    again = copy.copy(error)  # as multiprocessing rebuilds them: from class and arguments
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_completion_is_short_to_read_and_fit_for_json(server: ScriptedServer) -> None:
    with Client(server.endpoint, timeout_s=DEADLINE_S) as client:
        stream = client.stream("x")
        server.hear()
        server.say_the_end(7, text="t" * 500)
        done = stream.completion()
    assert str(done) == "t" * 500
    assert len(repr(done)) < 120
    assert json.loads(json.dumps(done.to_dict())) == done.to_dict()


def test_bytes_and_lists_for_a_stream_are_refused_with_the_way_out(server: ScriptedServer) -> None:
    with Client(server.endpoint) as client:
        with pytest.raises(RequestFailed, match="decode"):
            client.generate(b"x")
        with pytest.raises(RequestFailed, match="several strings"):
            client.stream(["a", "b"])  # type: ignore[list-item]


def test_dir_shows_what_the_package_offers() -> None:
    assert set(mgpu.__all__) <= set(dir(mgpu))
    assert "TYPE_CHECKING" not in dir(mgpu)


def test_a_thousand_requests_at_once_are_all_answered(tmp_path: Path) -> None:
    async def ask_all(endpoint: str) -> list[Completion]:
        async with AsyncClient(endpoint, timeout_s=60) as client:
            return await asyncio.gather(*(client.generate([number % 250], max_tokens=1) for number in range(1000)))

    with GatewayProcess(make_model_folder(tmp_path)) as gateway:
        answers = asyncio.run(ask_all(gateway.endpoint))
    assert [answer.token_ids for answer in answers] == [(number % 250,) for number in range(1000)]
