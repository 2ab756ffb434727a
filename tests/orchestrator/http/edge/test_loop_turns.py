"""Who has cost the loop much waits for others, and for its own turn."""

import asyncio
import time

import pytest
from starlette.requests import ClientDisconnect

from mgpu.orchestrator.gateway.front.pace import MOST_OWN_S, MOST_S, SHARE_OF_FEW_CORES
from mgpu.orchestrator.http.edge.loop_turns import LoopTurns, TurnPath, metered

A, B, C = ("A", "1"), ("B", "1"), ("C", "1")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def costly(turns: LoopTurns, *paths: TurnPath) -> None:
    for path in paths:
        turns.charge(path[0], 2 * MOST_OWN_S)


def test_who_has_cost_little_goes_on_at_once() -> None:
    async def run() -> None:
        turns = LoopTurns(1, Clock())
        costly(turns, B)
        with pytest.raises(StopIteration):
            turns.begin(A).send(None)
        waiting = turns.wait(B).send(None)
        assert isinstance(waiting, asyncio.Future)

    asyncio.run(run())


def test_one_turn_at_a_time_and_by_owner() -> None:
    """A has three requests in line before B comes with one; each runs to where it next waits before the next begins."""
    done: list[str] = []

    async def request(turns: LoopTurns, path: TurnPath) -> None:
        await turns.wait(path)
        done.append(f"{path[0]} begins")
        turns.charge(path[0], 0.01)
        done.append(f"{path[0]} waits")
        await asyncio.sleep(0)

    async def run() -> None:
        turns = LoopTurns(8, Clock())
        costly(turns, A, B)
        async with asyncio.TaskGroup() as tasks:
            for path in (A, ("A", "2"), ("A", "3"), B):
                tasks.create_task(request(turns, path))

    asyncio.run(run())
    assert done == [f"{owner} {what}" for owner in "ABAA" for what in ("begins", "waits")]


def test_on_few_cores_turns_have_their_share_of_the_time() -> None:
    async def run() -> float:
        turns, began_s, spent_s = LoopTurns(1), time.monotonic(), 0.0
        costly(turns, A)
        while time.monotonic() - began_s < 1.0:
            await turns.wait(A)
            turns.charge("A", 0.05)
            spent_s += 0.05
        return spent_s

    assert asyncio.run(run()) <= SHARE_OF_FEW_CORES * 2.0 + MOST_S


def test_with_cores_to_spare_nobody_pauses() -> None:
    async def run() -> float:
        turns = LoopTurns(8)
        costly(turns, A)
        began_s = time.monotonic()
        for _ in range(200):  # what they cost behind this process is no reason to wait
            await turns.wait(A)
            turns.charge_front("A", 1 << 20)
        return time.monotonic() - began_s

    assert asyncio.run(run()) < 0.5


def test_a_request_that_is_cancelled_in_line_holds_up_nobody() -> None:
    async def run() -> None:
        turns = LoopTurns(8)
        costly(turns, A, B)
        first = asyncio.create_task(turns.wait(A))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait_for(turns.wait(("A", "2")), 5.0)
        await asyncio.wait_for(turns.wait(A), 5.0)

    asyncio.run(run())


def test_the_steps_of_a_work_are_counted_and_the_work_is_as_without() -> None:
    costs: list[float] = []

    async def work(failure: Exception | None) -> None:
        end_s = time.thread_time() + 0.01
        while time.thread_time() < end_s:
            pass
        try:
            await asyncio.wait_for(asyncio.sleep(60), 0.01)
        except TimeoutError:
            if failure is not None:
                raise failure from None

    async def run(failure: Exception | None) -> None:
        await metered(work(failure), costs.append)

    asyncio.run(run(None))
    assert (len(costs) >= 2, sum(costs) == pytest.approx(0.01, abs=0.02)) == (True, True)
    with pytest.raises(KeyError, match="reason"):
        asyncio.run(run(KeyError("reason")))


def test_a_work_can_be_cancelled() -> None:
    async def run() -> None:
        task = asyncio.create_task(_metered_sleep())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


async def _metered_sleep() -> None:
    await metered(asyncio.sleep(60), lambda _seconds: None)


def test_who_leaves_the_line_ends_at_once_and_holds_up_nobody() -> None:
    async def run() -> None:
        loop, clock = asyncio.get_running_loop(), Clock()
        turns = LoopTurns(1, clock)
        costly(turns, A, A)
        futures = [loop.create_future() for _ in range(3)]
        requests = [asyncio.create_task(turns.begin(A, left)) for left in futures]
        await asyncio.sleep(0.01)
        for left in futures[:2]:
            left.set_result(None)
        await asyncio.sleep(0.01)
        assert [each.done() for each in requests] == [True, True, False], "there is no time for a turn"
        for each in requests[:2]:
            with pytest.raises(ClientDisconnect):
                await each
        clock.now_s += 10.0
        turns._look()
        await asyncio.wait_for(requests[2], 5.0)

    asyncio.run(run())
