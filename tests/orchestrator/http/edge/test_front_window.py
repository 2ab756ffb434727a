"""Requests are sent on few at a time, by owner in turn, and those of clients that have left never."""

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

import pytest

from mgpu.orchestrator.http.edge import front_window
from mgpu.orchestrator.http.edge.front_window import FORGET_S, WHOSE, FrontWindow, Whose
from mgpu.protocol.errors import RequestFailed


class Line:
    """Requests before a window of eight places; notes in which order they were let in."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.window = FrontWindow(8, lambda: self.now_s)
        self.sent: list[int] = []

    def submit(
        self, message_id: int, owner: str, body_bytes: int = 0, longest_s: float = math.inf
    ) -> asyncio.Task[None]:
        async def send() -> None:
            WHOSE.set(Whose((owner, f"{owner} {message_id}"), body_bytes))
            await self.window.enter(message_id, longest_s)
            self.sent.append(message_id)

        return asyncio.create_task(send())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_one_owner_has_half_of_the_places_and_a_newcomer_finds_one() -> None:
    async def test() -> None:
        line = Line()
        tasks = [line.submit(at, "A") for at in range(20)]
        await settle()
        assert line.sent == [0, 1, 2, 3]
        tasks.append(line.submit(100, "B"))
        await settle()
        assert line.sent == [0, 1, 2, 3, 100]
        for task in tasks:
            task.cancel()

    run(test())


def test_a_place_is_free_once_the_gateway_has_said_something() -> None:
    async def test() -> None:
        line = Line()
        tasks = [line.submit(at, "A") for at in range(6)]
        await settle()
        for _ in range(2):  # the second time it says more about the same request
            line.window.leave(2)
        await settle()
        assert line.sent == [0, 1, 2, 3, 4]
        tasks[5].cancel()

    run(test())


def test_who_has_left_is_never_sent() -> None:
    async def test() -> None:
        line = Line()
        tasks = [line.submit(at, "A") for at in range(1000)]
        await settle()
        for task in tasks:
            task.cancel()
        await settle()
        for at in range(4):
            line.window.leave(at)
        await line.submit(2000, "A")
        assert line.sent == [0, 1, 2, 3, 2000]
        assert not line.window._waiting

    run(test())


def test_owners_have_turns_at_a_free_place() -> None:
    async def test() -> None:
        line = Line()
        for owner, first in (("A", 0), ("B", 100), ("C", 200), ("D", 300)):
            for at in range(10):
                line.submit(first + at, owner)
        await settle()
        for _ in range(40):
            for each in list(line.sent):
                line.window.leave(each)
            await settle()
        begun = [each // 100 for each in line.sent]
        assert {begun[:20].count(owner) for owner in range(4)} <= set(range(3, 9))  # not A 10 and B 10
        assert sorted(line.sent) == [first + at for first in (0, 100, 200, 300) for at in range(10)]

    run(test())


def test_a_client_that_leaves_when_it_is_let_in_gives_its_place_back() -> None:
    async def test() -> None:
        line = Line()
        for at in range(4):
            line.submit(at, "A")
        waiting = line.submit(4, "A")
        await settle()
        line.window.leave(0)
        waiting.cancel()
        await settle()
        assert await line.submit(5, "A") is None
        assert line.sent == [0, 1, 2, 3, 5]

    run(test())


def test_a_lost_connection_frees_all_places() -> None:
    async def test() -> None:
        line = Line()
        for at in range(8):
            line.submit(at, "A")
        await settle()
        line.window.leave_all()
        await settle()
        assert line.sent == list(range(8))

    run(test())


def test_a_place_of_which_nothing_is_heard_is_free_after_a_while() -> None:
    async def test() -> None:
        line = Line()
        for at in range(4):
            line.submit(at, "A")
        await settle()
        line.now_s += FORGET_S + 1
        await line.submit(4, "A")
        assert line.sent == [0, 1, 2, 3, 4]

    run(test())


def test_too_many_too_large_or_too_long_is_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_window, "MOST_WAITING", 3)
    monkeypatch.setattr(front_window, "MOST_BYTES", 1000)
    monkeypatch.setattr(front_window, "MOST_TOTAL_BYTES", 1500)

    async def test() -> None:
        line = Line()
        tasks = [line.submit(at, "A") for at in range(4)]
        tasks += [line.submit(at, "A", 400) for at in (4, 5)]
        await settle()
        with pytest.raises(RequestFailed, match="requests of this client that wait have 1200 bytes, the limit is 1000"):
            await line.submit(6, "A", 400)
        tasks.append(line.submit(7, "A"))
        await settle()
        with pytest.raises(RequestFailed, match="3 requests of this client wait") as caught:
            await line.submit(8, "A")
        assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 1.0)
        with pytest.raises(RequestFailed, match="requests that wait have 800 bytes, the limit is 1500"):
            await line.submit(9, "B", 900)
        assert await line.submit(10, "B", 100) is None
        tasks[4].cancel()
        await settle()
        with pytest.raises(RequestFailed, match="did not take the request in time"):
            await line.submit(11, "A", longest_s=0.01)
        for task in tasks:
            task.cancel()

    run(test())
