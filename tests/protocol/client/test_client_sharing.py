"""One client in many threads, in forked processes, in several event loops, and in a process that is stopped."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.servers.gateway_process import DEADLINE_S, GatewayProcess
from mgpu import AsyncClient, Client, MgpuError
from mgpu.protocol.client.requests.parsed_text import ParsedText, TextPart

PRELUDE = "import multiprocessing, os, sys; from mgpu import Client; client = Client(sys.argv[1])\n"
FORKS = {
    "os.fork, ended by sys.exit": """
client.generate([1], max_tokens=2)
if not (child := os.fork()):
    assert client.generate([2], max_tokens=2, timeout_s=10).token_ids == (2, 2)
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
""",
    "the child closes the client": """
with client:
    if not os.fork():
        client.close()
        sys.exit()
    os.wait()
    assert client.generate([1], max_tokens=2).token_ids == (1, 1)
""",
    "a stream begun before the fork": """
stream = client.stream([1], max_tokens=100)
next(stream)
if not os.fork():
    try:
        next(stream), list(stream)
    except Exception as error:
        assert "belongs to the process" in str(error), error
        del stream
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
assert stream.completion().token_ids == (1,) * 100
""",
    "a fork beside threads that use the client": """
import threading
def use():
    while not done.is_set():
        client.generate([3], max_tokens=1)
done = threading.Event()
threads = [threading.Thread(target=use) for _ in range(4)]
[thread.start() for thread in threads]
for _ in range(5):
    if not os.fork():
        assert client.generate([2], max_tokens=2, timeout_s=10).token_ids == (2, 2)
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
done.set()
""",
    "multiprocessing.Pool": """
def work(number):
    return client.generate([number], max_tokens=2, timeout_s=10).token_ids
with multiprocessing.get_context("fork").Pool(4) as pool:
    assert pool.map(work, range(40)) == [(number, number) for number in range(40)]
""",
    "a preloaded app: workers and threads in each": """
from concurrent.futures import ThreadPoolExecutor
for _ in range(3):
    if not os.fork():
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda number: client.generate([number], max_tokens=1), range(16)))
        assert [answer.token_ids[0] for answer in answers] == list(range(16))
        sys.exit(7)
assert [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)] == [7] * 3
""",
}


@pytest.mark.parametrize("code", FORKS.values(), ids=list(FORKS))
def test_a_client_answers_in_a_forked_child_and_in_its_parent(gateway: GatewayProcess, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, gateway.endpoint], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_32_threads_share_a_client(gateway: GatewayProcess) -> None:
    together = threading.Barrier(32)

    def ask(number: int) -> list[tuple[int, ...]]:
        together.wait(DEADLINE_S)
        return [client.generate([number], max_tokens=3).token_ids for _ in range(5)]

    with Client(gateway.endpoint) as client, ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == [[(number,) * 3] * 5 for number in range(32)]


def test_a_stream_is_read_by_other_threads_than_the_one_that_began_it(gateway: GatewayProcess) -> None:
    with Client(gateway.endpoint) as client, ThreadPoolExecutor(8) as pool:
        streams = [client.stream([number], max_tokens=20) for number in range(8)]
        answers = pool.map(lambda stream: stream.completion().token_ids, streams)
        assert client.generate([9], max_tokens=50).token_ids == (9,) * 50
        assert list(answers) == [(number,) * 20 for number in range(8)]


def test_close_ends_the_requests_of_all_threads(gateway: GatewayProcess) -> None:
    gateway.engine.going.clear()
    client = Client(gateway.endpoint)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.generate, [number], max_tokens=50) for number in range(4)]
        gateway.engine.wait(lambda: len(gateway.engine.submits) == 4)
        client.close()
        for answer in asked:
            with pytest.raises(MgpuError, match="closed"):
                answer.result(DEADLINE_S)
        with pytest.raises(MgpuError, match="closed"):
            pool.submit(client.generate, [1]).result(DEADLINE_S)
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 4)


def test_the_connection_of_a_thread_ends_with_it(gateway: GatewayProcess) -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    with Client(gateway.endpoint) as client:
        before = descriptors()
        for number in range(5):
            thread = threading.Thread(target=client.generate, args=([number],), kwargs={"max_tokens": 1})
            thread.start()
            thread.join(DEADLINE_S)
        assert descriptors() <= before


def test_a_process_that_was_stopped_does_not_take_the_server_for_silent(gateway: GatewayProcess) -> None:
    code = "client = Client(sys.argv[1], silence_timeout_s=1.5); print('ready', flush=True)\n"
    code += "print(len(client.generate([1], max_tokens=5).token_ids))"
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, gateway.endpoint], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        gateway.engine.going.clear()
        gateway.engine.wait(lambda: len(gateway.engine.submits) == 1)
        process.send_signal(signal.SIGSTOP)
        threading.Event().wait(2.5)
        process.send_signal(signal.SIGCONT)
        gateway.engine.going.set()
        assert process.stdout.read() == "5\n"


def test_an_async_client_goes_on_in_the_next_event_loop(gateway: GatewayProcess) -> None:
    client = AsyncClient(gateway.endpoint)

    async def ask(number: int) -> tuple[int, ...]:
        return (await client.generate([number], max_tokens=2)).token_ids

    assert [asyncio.run(ask(number)) for number in range(3)] == [(number,) * 2 for number in range(3)]

    async def close() -> None:
        await client.close()

    asyncio.run(close())


def test_an_async_client_goes_on_in_a_forked_child(gateway: GatewayProcess) -> None:
    code = """
import asyncio; from mgpu import AsyncClient
client = AsyncClient(sys.argv[1])
async def ask():
    return (await client.generate([1], max_tokens=2, timeout_s=10)).token_ids
assert asyncio.run(ask()) == (1, 1)
if not os.fork():
    assert asyncio.run(ask()) == (1, 1)
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
assert asyncio.run(ask()) == (1, 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, gateway.endpoint], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", ["Client", "AsyncClient"])
def test_a_client_that_is_dropped_with_things_that_know_each_other_is_collected(
    gateway: GatewayProcess, make: str
) -> None:
    code = f"""
import asyncio, gc; from mgpu import AsyncClient
async def ask(client):
    await client.health()
    return client
for _ in range(3):
    client = Client(sys.argv[1]) if "{make}" == "Client" else asyncio.run(ask(AsyncClient(sys.argv[1])))
    connection = client._connection() if "{make}" == "Client" else client._connection
    connection.known_by = client.known_by = [client, connection]
    sockets = [fd for fd in os.listdir("/proc/self/fd")]
    del client, connection
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < len(sockets)
"""
    command = [sys.executable, "-c", PRELUDE + code, gateway.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_answer_that_cannot_be_read_ends_no_other_one(
    gateway: GatewayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ParsedText.add

    def fails_at_x(self: ParsedText, text: str, is_last: bool) -> TextPart:
        if "x" in text:
            raise IndexError("a bug of a parser")
        return add(self, text, is_last)

    monkeypatch.setattr(ParsedText, "add", fails_at_x)
    with Client(gateway.endpoint) as client, client.stream("a", max_tokens=200) as other:
        next(other)
        with pytest.raises(MgpuError, match="could not be read: IndexError"):
            client.generate("x", max_tokens=3, timeout_s=DEADLINE_S)
        assert other.completion().finish_reason == "length"
