"""The shapes of real applications against a whole server: all requests are answered, with the right tokens."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.models.random_model import write_random_model
from mgpu import AsyncClient, Client, Completion
from mgpu.launch.server_process import ServerProcess

PRELUDE = """
import multiprocessing, os, sys
from concurrent.futures import ThreadPoolExecutor
from mgpu import Client

client = Client(sys.argv[1], timeout_s=60)  # made, and used, before any fork

def ask(number):
    return client.generate([3 + number % 90], max_tokens=3, ignore_eos=True).token_ids

expected = [ask(number) for number in range(24)]
"""
PROGRAMS = {
    "multiprocessing.Pool with fork": """
with multiprocessing.get_context("fork").Pool(4) as pool:
    assert pool.map(ask, range(24)) == expected
""",
    # As gunicorn --preload does: the app is loaded once, workers are forked, threads serve, and a worker is replaced.
    "a preloaded app": """
def worker():
    with ThreadPoolExecutor(4) as pool:
        sys.exit(list(pool.map(ask, range(24))) != expected)

def fork_worker():
    return os.fork() or worker()

workers = {fork_worker() for _ in range(3)}
for replacements in (1, 0, 0, 0):
    pid, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 0
    workers.remove(pid)
    workers |= {fork_worker() for _ in range(replacements)}
assert not workers
assert ask(0) == expected[0]  # the parent's connection has survived its children
client.close()
""",
}


@pytest.fixture(scope="module")
def tiny_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = write_random_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)
    with ServerProcess("-m", str(model), "--device", "cpu") as server:
        yield server.wait_ready()


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=list(PROGRAMS))
def test_a_client_made_before_a_fork_answers_in_all_processes(tiny_endpoint: str, program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, tiny_endpoint], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_def_endpoints_in_32_threads_share_a_client(tiny_endpoint: str) -> None:
    """As a web framework runs plain functions: in a pool of threads, some of them streaming."""
    together = threading.Barrier(32)

    def endpoint(number: int) -> tuple[int, ...]:
        if number < 32:
            together.wait(60)
        prompt = [3 + number % 90]
        if number % 2:
            return client.generate(prompt, max_tokens=4, ignore_eos=True).token_ids
        pieces = client.stream(prompt, max_tokens=4, ignore_eos=True)
        return tuple(token for piece in pieces for token in piece.token_ids)

    with Client(tiny_endpoint, timeout_s=60) as client, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(endpoint, range(96)))
        expected = [each.token_ids for each in client.map([[3 + number % 90] for number in range(96)], max_tokens=4,
                                                          ignore_eos=True)]  # fmt: skip
    assert answers == expected


def test_a_gather_of_1000_requests_is_answered(tiny_endpoint: str) -> None:
    async def ask_all() -> list[Completion]:
        async with AsyncClient(tiny_endpoint, timeout_s=120) as client:
            asked = (client.generate([3 + number % 90], max_tokens=1, ignore_eos=True) for number in range(1000))
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask_all())
    assert len(answers) == 1000
    assert all(len(answer.token_ids) == 1 for answer in answers)
    assert [each.token_ids for each in answers[:90]] == [each.token_ids for each in answers[900:990]]
