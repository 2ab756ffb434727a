"""Put load on anything that streams tokens, and note when they come. What sends is handed in: a client, a peer, a fake.

Times are seconds on the clock of ``asyncio``'s loop.
"""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how many tokens are wanted of it."""

    prompt_ids: Sequence[int]
    new_tokens: int


Send = Callable[[Request], AsyncIterator[int]]
"""Sends a request when first awaited; gives the number of new tokens each time that some arrive."""


@dataclass(slots=True)
class Outcome:
    """What became of one request."""

    due_s: float
    """When it was to be sent: with Poisson arrivals a sender that is late must not make the server look fast."""
    pieces: list[tuple[float, int]] = field(default_factory=list)
    """When tokens arrived, and how many at once."""
    error: str = ""

    @property
    def first_s(self) -> float | None:
        """Return the time to the first token; None if none came."""
        return self.pieces[0][0] - self.due_s if self.pieces else None

    @property
    def gaps_s(self) -> list[float]:
        """Return the waits between arrivals, as a reader sees them."""
        times = [at_s for at_s, _ in self.pieces]
        return [late - early for early, late in itertools.pairwise(times)]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.pieces)


def random_requests(count: int, prompt_tokens: int, new_tokens: int, vocab_size: int, seed: int) -> list[Request]:
    """Make distinct prompts of random tokens; the same ones for the same seed, whoever answers them."""
    chance = random.Random(seed)
    return [Request([chance.randrange(3, vocab_size) for _ in range(prompt_tokens)], new_tokens) for _ in range(count)]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Return ``count`` times, in seconds from the start, of requests that come at random, ``rate`` a second."""
    chance, at_s, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += chance.expovariate(rate)
        arrivals.append(at_s)
    return arrivals


async def open_loop(send: Send, requests: Sequence[Request], arrivals_s: Sequence[float]) -> list[Outcome]:
    """Send each request at its time, whether or not earlier ones are answered. ValueError if the counts differ."""
    began_s = asyncio.get_running_loop().time()
    timed = zip(requests, arrivals_s, strict=True)
    return list(await asyncio.gather(*(_at(send, request, began_s + at_s) for request, at_s in timed)))


async def _at(send: Send, request: Request, due_s: float) -> Outcome:
    await asyncio.sleep(due_s - asyncio.get_running_loop().time())
    return await answer(send, request, due_s)


async def closed_loop(send: Send, requests: Sequence[Request], concurrency: int) -> list[Outcome]:
    """Keep ``concurrency`` requests in flight until all are answered."""
    waiting, outcomes = iter(requests), list[Outcome]()
    await asyncio.gather(*(_one_after_another(send, waiting, outcomes) for _ in range(concurrency)))
    return outcomes


async def _one_after_another(send: Send, waiting: Iterator[Request], outcomes: list[Outcome]) -> None:
    for request in waiting:
        outcomes.append(await answer(send, request, asyncio.get_running_loop().time()))


async def answer(send: Send, request: Request, due_s: float) -> Outcome:
    """Send one request and read its answer; whatever goes wrong is part of the outcome."""
    outcome, clock = Outcome(due_s), asyncio.get_running_loop().time
    try:
        async for count in send(request):
            if count:
                outcome.pieces.append((clock(), count))
    except Exception as error:  # the edge of a measurement: errors are counted, not raised
        outcome.error = f"{type(error).__name__}: {error}"
    if not outcome.error and outcome.num_tokens != request.new_tokens:
        outcome.error = f"{outcome.num_tokens} tokens instead of {request.new_tokens}"
    return outcome
