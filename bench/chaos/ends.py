"""Faults that end something: the parent is killed or told to stop, or clients vanish."""

import random
import signal
import time
from contextlib import ExitStack

import msgpack
import zmq

from bench.chaos.load import STANDSTILL_S, Streams
from bench.chaos.server import Server, ServerOptions, is_alive, shared_memory
from bench.chaos.table import Row
from bench.waiting import wait_until
from mgpu import Client

LEFT_S = 2.0
BLOCKS_BACK_S = 5.0
"""What a wave of clients that vanish is given until none of their requests is on the workers or in line."""
WAVE = 20
ANSWER = 30
TERMINATE = "SIGTERM with 64 streams"


def kill_parents(server_options: ServerOptions, count: int) -> Row:
    """SIGKILL the parent under 16 streams: after two seconds nothing of the server may be left."""
    row = Row("SIGKILL of the parent")
    for _ in range(count):
        shared_before = shared_memory()
        with Server(server_options) as server, Client(server.endpoint) as client:
            streams = [client.stream([number + 3], max_tokens=400) for number in range(16)]
            next(streams[0])
            kill_parent(server, row, shared_before)
    return row


def kill_loading_parents(server_options: ServerOptions, count: int) -> Row:
    """SIGKILL the parent while its workers import torch, meet and load."""
    row = Row("SIGKILL of the parent, load")
    rng = random.Random(3)
    for _ in range(count):
        shared_before = shared_memory()
        with Server(server_options, wait=False) as server:
            wait_until(lambda server=server: bool(server.workers()), 60)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 3))
            kill_parent(server, row, shared_before)
    return row


def kill_parent(server: Server, row: Row, shared_before: tuple[str, ...]) -> None:
    family = server.children("")
    began_s = time.monotonic()
    server.process.process.kill()
    server.process.process.wait()
    base = server.process.runtime_base
    tests = {
        "processes": lambda: not any(map(is_alive, family)),
        "files": lambda: [path.name for path in base.iterdir()] == ["log"],
        "sockets": lambda: not server.sockets(),
        "shared memory": lambda: set(shared_memory()) <= set(shared_before),
    }
    for what, is_gone in tests.items():
        if not wait_until(is_gone, max(0.02, began_s + LEFT_S - time.monotonic())):
            row.problems.append(f"{what} were left")
    row.injected(time.monotonic() - began_s)


def terminate(server_options: ServerOptions, count: int) -> Row:
    """Stop ``count`` servers in the midst of 64 streams."""
    row = Row(TERMINATE)
    usual: dict[int, tuple[int, ...]] = {}
    for _ in range(count):
        with Server(server_options) as server:
            _terminate(server, row, usual)
    return row


def terminate_server(server: Server) -> Row:
    """Stop this one."""
    row = Row(TERMINATE)
    _terminate(server, row, {})
    return row


def _terminate(server: Server, row: Row, usual: dict[int, tuple[int, ...]]) -> None:
    """SIGTERM with 64 streams: all of them finish as in the first run, and the exit status is the signal's.

    ``usual`` has the answers of the first run, or gets them.
    """
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(server.endpoint, silence_timeout_s=120.0)) for _ in range(4)]
        streams = [clients[number % 4].stream([number + 3], max_tokens=ANSWER, ignore_eos=True) for number in range(64)]
        for stream in streams[-4:]:
            next(stream)
        began_s = time.monotonic()
        server.process.process.send_signal(signal.SIGTERM)
        for number, stream in enumerate(streams):
            ids = stream.completion().token_ids
            row.finished += 1
            row.tokens += len(ids)
            row.lost += max(0, ANSWER - len(ids))
            row.repeated += max(0, len(ids) - ANSWER)
            row.different += usual.setdefault(number, ids) != ids
        status = server.process.process.wait(STANDSTILL_S)
        if status not in (0, -signal.SIGTERM):
            row.problems.append(f"exit status {status}")
        row.injected(time.monotonic() - began_s)


def leave(server: Server, streams: Streams, count: int) -> Row:
    """Vanish without a word, in the prompt or in the answer, beside streams that go on.

    After each wave no more requests may be alive than there are such streams.
    """
    row = Row("client gone mid-prefill, mid-decode")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with Client(server.endpoint) as client:
        for first in range(0, count, WAVE):
            numbers = range(first, min(first + WAVE, count))
            sockets = [ask(context, server.endpoint, number) for number in numbers]
            for number, socket in zip(numbers, sockets, strict=True):
                for _ in range(1 if number % 2 else 3):  # accepted; or the first tokens too
                    if not socket.poll(int(STANDSTILL_S * 1000)):
                        row.problems.append(f"client {number} was not answered")
                    socket.recv_multipart()
                socket.close()
            began_s = time.monotonic()
            if not wait_until(lambda: _alive(client) <= streams.count, BLOCKS_BACK_S):
                row.problems.append(f"requests are still alive: {_alive(client):g} of {streams.count}")
            row.injected(time.monotonic() - began_s, count=len(sockets))
    context.term()
    return row


def check_no_blocks(server: Server, row: Row) -> None:
    """With every stream ended, not one block may be held."""
    with Client(server.endpoint) as client:
        if not wait_until(lambda: client.stats()["kv_blocks_used"] == 0, 10):
            row.problems.append(f"blocks are still held: {client.stats()}")


def _alive(client: Client) -> float:
    stats = client.stats()
    return stats["running"] + stats["waiting"]


def ask(context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, number: int) -> "zmq.Socket[bytes]":
    """Send a request whose prompt nobody has had before."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    prompt = [3 + number // 1000, 3 + number % 1000, *range(3, 130)]
    request = {"type": "generate", "id": 1, "prompt_ids": prompt, "max_tokens": 200, "stream": True}
    socket.send_multipart([b"mgpu1", msgpack.packb({**request, "ignore_eos": True})])
    return socket
