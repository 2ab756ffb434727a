"""Loads, and the rows that are made of their runs."""

import asyncio
from collections.abc import AsyncIterator

from mgpu.launch.bench.limit import Limit
from mgpu.launch.bench.load import Outcome, Request
from mgpu.launch.bench.serve import Load, Run, Sizes, loads, measure_load, serving_row


def run_of(rate: float, errors: int = 0) -> Run:
    """Make a run of two requests with ten tokens each that all come within 20 / ``rate`` seconds."""
    last_s = 20 / rate
    whole = [Outcome(0.0, [(last_s / 2, 1), (last_s, 9)]) for _ in range(2)]
    return Run([*whole, *(Outcome(0.0, [(last_s, 5)], "broken") for _ in range(errors))])


def test_closed_loops_get_more_requests_where_they_have_many_clients() -> None:
    assert loads([1, 100], [2.5], [256], 64) == [
        Load("closed", 1, 64), Load("closed", 100, 400), Load("poisson", 2.5, 64), Load("burst", 256, 256),
    ]  # fmt: skip


def test_a_row_has_the_median_rate_its_spread_and_percentiles_over_all_runs() -> None:
    row = serving_row(Load("closed", 2, 2), [run_of(10), run_of(40), run_of(20)])
    assert (row["tokens_per_s"], row["tokens_per_s_low"], row["tokens_per_s_high"]) == (20.0, 10.0, 40.0)
    assert (row["requests"], row["errors"], row["repeats"]) == (6, 0, 3)
    assert (row["ttft_p50_ms"], row["ttft_p99_ms"]) == (500.0, 1000.0)
    assert (row["gap_p50_ms"], row["gap_p99_ms"]) == (500.0, 1000.0)


def test_tokens_of_failed_requests_do_not_count_and_the_first_error_is_told() -> None:
    row = serving_row(Load("burst", 2, 2), [run_of(10, errors=2)])
    assert (row["tokens_per_s"], row["errors"], row["note"]) == (10.0, 2, "first error: broken")


def test_a_run_in_which_all_fails_is_a_row_too() -> None:
    row = serving_row(Load("burst", 1, 1), [Run([Outcome(0.0, [], "refused")])])
    assert (row["tokens_per_s"], row["ttft_p50_ms"], row["gap_p99_ms"]) == (0.0, None, None)


def test_loads_are_warmed_up_then_repeated_and_set_beside_the_limit() -> None:
    asked: list[Request] = []

    async def send(request: Request) -> AsyncIterator[int]:
        asked.append(request)
        yield request.new_tokens

    limit = Limit(weight_bytes=1000, kv_token_bytes=1, bytes_per_s=1e6)
    closed = asyncio.run(measure_load(send, Load("closed", 2, 4), Sizes(8, 4, 100), 3, limit))
    assert [request.new_tokens for request in asked] == [2, 2, *[4] * 12]
    assert len({tuple(request.prompt_ids) for request in asked}) == 14
    assert closed["limit"] == limit.tokens_per_s(2, 10)
    random_ones = asyncio.run(measure_load(send, Load("poisson", 1000.0, 2), Sizes(8, 4, 100), 1, limit))
    assert "limit" not in random_ones
