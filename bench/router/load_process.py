"""Processes that put load on a server each: one alone could not read what several GPUs write.

Their clock is the same (``time.monotonic``), so what came in a window can be counted over all of them.
"""

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Self

from mgpu import AsyncClient
from mgpu.launch.bench.load import Outcome, Request, closed_loop

ANSWER_S = 120.0


@dataclass(frozen=True, slots=True)
class Share:
    """What one process sends: its requests, so many at the same time, to one server."""

    endpoint: str
    requests: Sequence[Request]
    concurrency: int


class LoadProcesses:
    """Processes that stay, so that starting them is not measured."""

    def __init__(self, count: int) -> None:
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
        list(self._pool.map(_nothing, range(count)))

    def run(self, shares: Sequence[Share]) -> list[Outcome]:
        """Send all shares at the same time, one in each process. SystemExit if a request failed."""
        outcomes = [each for part in self._pool.map(_send, shares) for each in part]
        if problem := next((each.error for each in outcomes if each.error), ""):
            raise SystemExit(f"a request failed: {problem}")
        return outcomes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _nothing(_: int) -> None:
    """Make a process of the pool import this module."""


def _send(share: Share) -> list[Outcome]:
    return asyncio.run(_send_all(share))


async def _send_all(share: Share) -> list[Outcome]:
    async with AsyncClient(share.endpoint, timeout_s=ANSWER_S) as client:

        async def send(request: Request) -> AsyncIterator[int]:
            async for piece in client.stream(request.prompt_ids, max_tokens=request.new_tokens, ignore_eos=True):
                yield len(piece.token_ids)

        return await closed_loop(send, share.requests, share.concurrency)


def rate_while_all_run(outcomes: Sequence[Outcome]) -> float:
    """Return tokens per second from the moment in which the last answer began to that in which the first one ended."""
    begin_s = max(each.pieces[0][0] for each in outcomes)
    end_s = min(each.pieces[-1][0] for each in outcomes)
    if end_s <= begin_s:
        raise SystemExit(
            f"the first answer ended {begin_s - end_s:.1f} s before the last one began; ask for more tokens"
        )
    return sum(n for each in outcomes for at_s, n in each.pieces if begin_s < at_s <= end_s) / (end_s - begin_s)


def seconds_of(outcomes: Sequence[Outcome]) -> float:
    """Return the time from the first request to the last token."""
    return max(each.pieces[-1][0] for each in outcomes) - min(each.due_s for each in outcomes)
