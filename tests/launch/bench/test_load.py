"""When requests are sent, and what is noted of their answers: on a fake clock-driven server, without a socket."""

import asyncio
import statistics
from collections.abc import AsyncIterator

from mgpu.launch.bench.load import Outcome, Request, closed_loop, open_loop, poisson_arrivals, random_requests

REQUESTS = [Request([1, 2, 3], 3)] * 12


class FakeServer:
    """Answers with one token per turn of the loop; counts how many requests it has at a time."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns
        self.in_flight = self.most = self.sent = 0

    async def send(self, request: Request) -> AsyncIterator[int]:
        self.sent += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        for _ in range(self.turns):
            await asyncio.sleep(0)
            yield 1
        self.in_flight -= 1


def test_a_closed_loop_keeps_as_many_in_flight_as_there_are_clients() -> None:
    server = FakeServer()
    outcomes = asyncio.run(closed_loop(server.send, REQUESTS, 4))
    assert (server.most, server.sent, len(outcomes)) == (4, 12, 12)
    assert all(not outcome.error and outcome.num_tokens == 3 for outcome in outcomes)


def test_a_closed_loop_has_no_more_clients_than_requests() -> None:
    server = FakeServer()
    asyncio.run(closed_loop(server.send, REQUESTS, 100))
    assert server.most == 12


def test_poisson_arrivals_have_the_rate_and_the_spread_of_an_exponential() -> None:
    arrivals = poisson_arrivals(50.0, 4000, seed=1)
    waits = [late - early for early, late in zip([0.0, *arrivals], arrivals, strict=False)]
    assert abs(statistics.mean(waits) * 50 - 1) < 0.1
    assert abs(statistics.stdev(waits) * 50 - 1) < 0.1
    assert min(waits) > 0


def test_arrivals_and_prompts_are_the_same_for_the_same_seed_only() -> None:
    assert poisson_arrivals(2.0, 5, seed=3) == poisson_arrivals(2.0, 5, seed=3) != poisson_arrivals(2.0, 5, seed=4)
    assert random_requests(2, 8, 4, 100, seed=3) == random_requests(2, 8, 4, 100, seed=3)
    first, second = random_requests(2, 8, 4, 100, seed=3)
    assert first != second
    assert all(3 <= token < 100 for token in first.prompt_ids)


def test_an_open_loop_sends_without_waiting_for_answers() -> None:
    async def measure() -> list[Outcome]:
        release = asyncio.Event()
        arrived = 0

        async def send(request: Request) -> AsyncIterator[int]:
            nonlocal arrived
            arrived += 1
            if arrived == 3:
                release.set()  # nothing is answered before all are there
            await release.wait()
            yield 3

        return await asyncio.wait_for(open_loop(send, REQUESTS[:3], [0.0, 0.001, 0.002]), 10)

    assert [outcome.num_tokens for outcome in asyncio.run(measure())] == [3, 3, 3]


def test_a_request_that_is_sent_late_is_timed_from_when_it_was_due() -> None:
    async def measure() -> tuple[Outcome, float]:
        began_s = asyncio.get_running_loop().time()
        outcomes = await open_loop(FakeServer().send, REQUESTS[:1], [-1.0])
        return outcomes[0], began_s

    outcome, began_s = asyncio.run(measure())
    assert outcome.due_s <= began_s - 0.9
    assert outcome.first_s is not None
    assert outcome.first_s >= 1.0


def test_errors_and_short_answers_are_counted_and_do_not_end_the_run() -> None:
    async def send(request: Request) -> AsyncIterator[int]:
        if request.prompt_ids[0] == 0:
            raise RuntimeError("full")
        yield request.prompt_ids[0]

    outcomes = asyncio.run(closed_loop(send, [Request([first], 3) for first in (0, 2, 3)], 1))
    assert [outcome.error for outcome in outcomes] == ["RuntimeError: full", "2 tokens instead of 3", ""]


def test_gaps_are_between_arrivals_whatever_they_bring() -> None:
    outcome = Outcome(10.0, [(10.5, 1), (10.75, 4), (11.75, 1)])
    assert (outcome.first_s, outcome.gaps_s, outcome.num_tokens) == (0.5, [0.25, 1.0], 6)
    assert Outcome(0.0).first_s is None
