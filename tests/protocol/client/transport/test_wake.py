"""Waiting with a limit: for what has happened, what happens, and what does not."""

import asyncio

import pytest

from mgpu.protocol.client.transport.wake import Wake


def test_all_that_wait_go_on_when_it_is_set() -> None:
    async def wait_for_two() -> None:
        wake = Wake()
        waits = [asyncio.create_task(wake.wait(1000)) for _ in range(2)]
        await asyncio.sleep(0)
        wake.set()
        await asyncio.gather(*waits)
        await wake.wait(1000)  # it is still set
        assert wake.is_set()

    asyncio.run(asyncio.wait_for(wait_for_two(), 20))


def test_a_wait_ends_at_its_limit_and_the_event_stays_unset() -> None:
    async def wait_in_vain() -> None:
        wake = Wake()
        wake.set()
        wake.clear()
        for seconds in (0.001, 0, -1):
            await wake.wait(seconds)
        assert not wake.is_set()

    asyncio.run(asyncio.wait_for(wait_in_vain(), 20))


def test_a_wait_that_is_cancelled_leaves_the_others() -> None:
    async def cancel_one() -> None:
        wake = Wake()
        gone, stays = (asyncio.create_task(wake.wait(1000)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        wake.set()
        await stays

    asyncio.run(asyncio.wait_for(cancel_one(), 20))
