"""Connections are accepted a few at a time, at a pace where cores are few."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from mgpu.orchestrator.http.edge.accepting import CONNECTION_S, MOST_AT_ONCE, SHARE_OF_FEW_CORES, Acceptor


class Counted(asyncio.Protocol):
    def __init__(self, opened: list[float]) -> None:
        self._opened = opened

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._opened.append(time.monotonic())
        transport.close()


@contextmanager
def many_waiting(count: int) -> Iterator[socket.socket]:
    """Yield a listening socket to which ``count`` clients have connected."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=count))
        for _ in range(count):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        yield listener


def accept_all(count: int, num_cores: int, each_turn: Callable[[int], None] = lambda _number: None) -> float:
    """Return how long it took to accept ``count`` connections that wait."""

    async def run(listener: socket.socket) -> float:
        opened: list[float] = []
        began_s = time.monotonic()
        acceptor = Acceptor(listener, lambda: Counted(opened), num_cores)
        seen = 0
        while len(opened) < count:
            assert time.monotonic() < began_s + 30
            await asyncio.sleep(0)
            each_turn(len(opened) - seen)
            seen = len(opened)
        acceptor.close()
        return max(opened) - began_s

    with many_waiting(count) as listener:
        return asyncio.run(run(listener))


def test_the_loop_goes_on_between_newcomers() -> None:
    numbers: list[int] = []
    accept_all(200, 8, numbers.append)
    assert max(numbers) <= 2 * MOST_AT_ONCE


def test_on_few_cores_newcomers_take_a_part_of_the_time() -> None:
    count = 600
    saved_s = 0.1  # a burst after a quiet while
    assert accept_all(count, 1) > 0.7 * (count * CONNECTION_S - saved_s) / SHARE_OF_FEW_CORES
    assert accept_all(100, 1) < 0.5, "a burst is let in at once"


@pytest.mark.parametrize("num_cores", [1, 8])
def test_after_its_end_nobody_is_accepted(num_cores: int) -> None:
    async def run(listener: socket.socket) -> None:
        opened: list[float] = []
        acceptor = Acceptor(listener, lambda: Counted(opened), num_cores)
        acceptor.close()
        await asyncio.sleep(0.05)
        assert not opened

    with many_waiting(3) as listener:
        asyncio.run(run(listener))
