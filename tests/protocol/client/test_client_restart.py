"""A client whose server was restarted: each start has another endpoint, which a client without a named one finds."""

import asyncio
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder
from harness.waiting import eventually
from mgpu import AsyncClient, Client, MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.discovery import INFO_NAME, LOCK_NAME, RunningServer, write_server


class Restartable:
    """One server at a time, listed where clients look."""

    def __init__(self, base: Path, model: Path) -> None:
        self._base, self._model = base, model
        self._starts = 0
        self.start()

    def start(self, bind: str | None = None) -> None:
        self._starts += 1
        self._folder = self._base / f"{self._starts:08x}"
        self._folder.mkdir(mode=0o700)
        self._lock = (self._folder / LOCK_NAME).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.gateway = GatewayProcess(self._model, bind=bind or f"ipc://{self._folder}/front.sock")
        write_server(self._folder, RunningServer(self.gateway.endpoint, os.getpid(), "tiny", "0"))

    def end(self) -> None:
        (self._folder / INFO_NAME).unlink()
        self._lock.close()
        self.gateway.close()

    def restart(self, bind: str | None = None) -> None:
        self.end()
        self.start(bind)


@pytest.fixture
def restartable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restartable]:
    monkeypatch.delenv("MGPU_ENDPOINT", raising=False)
    monkeypatch.setenv("MGPU_RUNTIME_DIR", str(tmp_path))
    model = tmp_path / "model"
    model.mkdir()
    started = Restartable(tmp_path, make_model_folder(model))
    yield started
    started.end()


def answers(client: Client, token: int = 1) -> bool:
    return client.generate([token], max_tokens=2, timeout_s=10).token_ids == (token, token)


@pytest.mark.parametrize("named", [None, "tiny"])
def test_the_next_request_finds_the_restarted_server_and_streams_of_the_old_one_fail(
    restartable: Restartable, named: str | None
) -> None:
    with Client(named) as client:
        restartable.gateway.engine.going.clear()
        stream = client.stream([1])
        restartable.gateway.engine.wait(lambda: len(restartable.gateway.engine.submits) == 1)
        restartable.restart()
        assert answers(client)
        with pytest.raises(MgpuError, match=r"has ended; start one with: mgpu-launch serve|stopped|ended"):
            list(stream)
        assert restartable.gateway.endpoint in repr(client)
        restartable.restart()
        assert client.health().state == "ready"


def test_all_threads_find_it_too(restartable: Restartable) -> None:
    with Client() as client, ThreadPoolExecutor(1) as old, ThreadPoolExecutor(1) as new:
        assert old.submit(answers, client).result(20)
        restartable.restart()
        assert [pool.submit(answers, client).result(20) for pool in (old, new)] == [True, True]
        assert answers(client)


def test_a_forked_child_finds_it_too(restartable: Restartable) -> None:
    code = """
import os, sys
from mgpu import Client
client = Client()
assert client.generate([1], max_tokens=2).token_ids == (1, 1)
print("asked", flush=True)
sys.stdin.readline()
if not (child := os.fork()):
    assert client.generate([2], max_tokens=2, timeout_s=10).token_ids == (2, 2)
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert client.generate([3], max_tokens=2, timeout_s=10).token_ids == (3, 3)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        restartable.restart()
        process.communicate("\n", timeout=60)
        assert process.returncode == 0


def test_an_async_client_finds_it_too(restartable: Restartable) -> None:
    async def use() -> None:
        async with AsyncClient() as client:
            assert (await client.generate([1], max_tokens=2)).token_ids == (1, 1)
            restartable.gateway.engine.going.clear()
            stream = client.stream([1])
            await stream.accepted()
            restartable.restart()
            done = await asyncio.gather(*(client.generate([at], max_tokens=1, timeout_s=10) for at in (2, 3)))
            assert [each.token_ids for each in done] == [(2,), (3,)]
            with pytest.raises(MgpuError, match=r"ended|stopped"):
                await stream.completion()

    asyncio.run(use())


def test_a_server_found_on_tcp_is_found_again(restartable: Restartable) -> None:
    restartable.restart("tcp://127.0.0.1:0")
    with Client() as client:
        restartable.restart("tcp://127.0.0.1:0")
        eventually(lambda: answers(client), lambda: repr(client))


def test_without_a_server_the_next_request_says_so_and_a_later_one_finds_it(restartable: Restartable) -> None:
    with Client() as client:
        restartable.end()
        with pytest.raises(ServerUnreachable, match="start one with: mgpu-launch serve -m MODEL"):
            answers(client)
        restartable.start()
        assert answers(client)


def test_of_several_servers_the_next_request_lists_them(restartable: Restartable, tmp_path: Path) -> None:
    with Client() as client:
        restartable.restart()
        other = tmp_path / "ffffffff"
        other.mkdir(mode=0o700)
        with (other / LOCK_NAME).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_server(other, RunningServer(f"ipc://{other}/front.sock", os.getpid(), "large", "0"))
            with pytest.raises(ServerUnreachable, match=r"several mgpu servers.*\(tiny\).*--endpoint") as caught:
                answers(client)
            assert f"{other}/front.sock (large)" in str(caught.value)
        assert answers(client)


def test_a_named_endpoint_stays(restartable: Restartable) -> None:
    with Client(restartable.gateway.endpoint) as client:
        restartable.restart()
        with pytest.raises(ServerUnreachable, match="has ended; start one with"):
            answers(client)


def test_the_wait_for_a_connection_ends_with_timeout_s(tmp_path: Path) -> None:
    nobody = f"ipc://{tmp_path}/nobody"

    async def ask() -> None:
        await AsyncClient(nobody, connect_timeout_s=60).generate("x", timeout_s=0.2)

    begun_s = time.monotonic()
    with pytest.raises(ServerUnreachable, match=r"within 0\.2 s"):
        Client(nobody, timeout_s=0.2, connect_timeout_s=60)
    with pytest.raises(ServerUnreachable, match=r"within 0\.2 s"):
        asyncio.run(ask())
    assert time.monotonic() - begun_s < 30


def test_a_request_without_a_gateway_waits_for_it_no_longer_than_timeout_s(restartable: Restartable) -> None:
    with Client(silence_timeout_s=60) as client:
        restartable.gateway.process.kill()
        eventually(client._connection().is_lost, lambda: repr(client))
        with pytest.raises(ServerUnreachable, match=r"within 0\.\d+ s"):
            client.generate("x", timeout_s=0.3)


@pytest.mark.parametrize("messages", ["Hello", b"Hello", ["Hello"], {"role": "user", "content": "Hello"}])
def test_text_as_chat_messages_is_refused_with_what_to_pass(gateway: GatewayProcess, messages: object) -> None:
    words = r'messages must be a list such as \[{"role": "user", "content": "Hello"}\], got'

    async def ask() -> None:
        await AsyncClient(gateway.endpoint).chat(messages)  # type: ignore[call-overload]

    with Client(gateway.endpoint) as client:
        for call in (client.chat, client.stream_chat, AsyncClient(gateway.endpoint).stream_chat):
            with pytest.raises(RequestFailed, match=words):
                call(messages)  # type: ignore[operator]
    with pytest.raises(RequestFailed, match=words):
        asyncio.run(ask())


@pytest.mark.parametrize("address", ["http://localhost:8000", "https://host/v1"])
def test_an_http_address_as_endpoint_is_refused_with_what_to_use(address: str) -> None:
    with pytest.raises(
        ServerUnreachable, match=r"is not an endpoint but an HTTP address.*ipc:///path or tcp://host:port"
    ):
        Client(address)
