"""The clients' questions about text: answered, asked again when the server is overloaded, and given up in time."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from harness.servers.gateway_process import BOS, GatewayProcess
from harness.servers.scripted_server import DEADLINE_S, ScriptedServer
from mgpu import AsyncClient, Client, DeadlineExceeded, RequestFailed, ServerUnreachable

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedServer]:
    with closing(ScriptedServer(tmp_path)) as server:
        yield server


def test_the_async_client_asks_the_same(gateway: GatewayProcess) -> None:
    async def ask() -> list[object]:
        async with AsyncClient(gateway.endpoint) as client:
            return await asyncio.gather(
                client.count_tokens("x"),
                client.tokenize("x"),
                client.detokenize([ord("x")]),
                client.apply_chat_template(HI),
                client.tokenize("x", add_special_tokens=False),
            )

    chat = "<s><|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert asyncio.run(ask()) == [2, [BOS, ord("x")], "x", chat, [ord("x")]]


@pytest.mark.parametrize(("prompt", "words"), [
    (b"x", "got bytes"), (None, "messages must be"), ([], "messages must be"), ("\ud800", "lone surrogate"),
])  # fmt: skip
def test_what_is_no_prompt_is_refused_before_it_is_sent(gateway: GatewayProcess, prompt: str, words: str) -> None:
    with Client(gateway.endpoint) as client, pytest.raises(RequestFailed, match=words):
        client.count_tokens(prompt)


def refuse(server: ScriptedServer, times: int) -> None:
    for _ in range(times):
        message = server.hear()
        server.say(id=message["id"], type="failed", code="overloaded", message="full", retry_after_s=0.01)


def test_an_overloaded_server_is_asked_again(scripted: ScriptedServer) -> None:
    def act() -> None:
        refuse(scripted, 3)
        scripted.say(id=scripted.hear()["id"], type="tokenized", num_tokens=5)

    with Client(scripted.endpoint, timeout_s=DEADLINE_S) as client, ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        assert client.count_tokens("x") == 5
        acting.result()


@pytest.mark.parametrize(("retries", "timeout_s"), [(1, DEADLINE_S), (0, DEADLINE_S)])
def test_tries_are_bounded(scripted: ScriptedServer, retries: int, timeout_s: float) -> None:
    with (
        Client(scripted.endpoint, timeout_s=timeout_s, retries=retries) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        acting = pool.submit(refuse, scripted, 1 + retries)
        with pytest.raises(RequestFailed, match="full"):
            client.count_tokens("x")
        acting.result()


def test_a_server_that_says_nothing_is_given_up_and_told(scripted: ScriptedServer) -> None:
    with Client(scripted.endpoint, silence_timeout_s=0.2) as client:
        with pytest.raises(ServerUnreachable, match="does not answer"):
            client.count_tokens("x")
        assert [scripted.hear()["type"] for _ in range(2)] == ["tokenize", "cancel"]


def test_keepalives_are_signs_of_life_until_the_time_is_over(scripted: ScriptedServer) -> None:
    def act() -> None:
        message = scripted.hear()
        while message["type"] != "cancel":
            scripted.say(id=message["id"], type="keepalive")
            if scripted.has_message(0.05):
                message = scripted.hear()

    with (
        Client(scripted.endpoint, timeout_s=0.6, silence_timeout_s=0.3) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        acting = pool.submit(act)
        with pytest.raises(DeadlineExceeded, match="timeout_s"):
            client.count_tokens("x")
        acting.result()


def test_a_reply_that_comes_too_late_is_skipped(scripted: ScriptedServer) -> None:
    with Client(scripted.endpoint, silence_timeout_s=0.2) as client, ThreadPoolExecutor(1) as pool:
        with pytest.raises(ServerUnreachable):
            client.count_tokens("x")
        late = scripted.hear()["id"]
        assert scripted.hear() == {"type": "cancel", "id": late}

        def act() -> None:
            message = scripted.hear()
            scripted.say(id=late, type="tokenized", num_tokens=1)
            scripted.say(id=message["id"], type="tokenized", num_tokens=2)

        acting = pool.submit(act)
        assert client.count_tokens("x") == 2
        acting.result()
        assert not client._session._replies
        assert not client._session._asked
