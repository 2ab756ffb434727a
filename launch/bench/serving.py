"""The loads of ``bench serve`` and what their requests met; the same for mgpu and for the peers of ``bench/peers``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mgpu.launch.bench.limit import Limit
from mgpu.launch.bench.load import Outcome, Send, closed_loop, open_loop, poisson_arrivals, random_requests
from mgpu.launch.bench.summary import Row, percentile, spread

SHOWN = (
    "load", "level", "requests", "errors", "tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms",
    "share",
)  # fmt: skip
FEWEST_PER_CLIENT = 4
"""Requests that every client of a closed loop sends, so that its beginning and end weigh little."""


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: ``level`` clients in a closed loop, ``level`` a second at random, or all at once."""

    kind: Literal["closed", "poisson", "burst"]
    level: float
    count: int
    """Requests of one run."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of every prompt and of every answer; what prompts are made of."""

    prompt_tokens: int
    new_tokens: int
    vocab_size: int


def loads(concurrency: Sequence[int], rates: Sequence[float], bursts: Sequence[int], count: int) -> list[Load]:
    """List what to measure; closed loops get more than ``count`` requests where they have many clients."""
    return [
        *(Load("closed", clients, max(count, FEWEST_PER_CLIENT * clients)) for clients in concurrency),
        *(Load("poisson", rate, count) for rate in rates),
        *(Load("burst", requests, requests) for requests in bursts),
    ]


async def run_load(send: Send, load: Load, sizes: Sizes, seed: int) -> "Run":
    """Run a load once; every seed has prompts and arrivals of its own."""
    requests = random_requests(load.count, sizes.prompt_tokens, sizes.new_tokens, sizes.vocab_size, seed)
    if load.kind == "poisson":
        return Run(await open_loop(send, requests, poisson_arrivals(load.level, load.count, seed)))
    return Run(await closed_loop(send, requests, int(load.level)))


async def measure_load(send: Send, load: Load, sizes: Sizes, repeat: int, limit: Limit | None = None) -> Row:
    """Run a load ``repeat`` times, after a few requests that warm up, and make one row of it."""
    clients = min(load.count, int(load.level) or 1)
    short = replace(sizes, new_tokens=min(2, sizes.new_tokens))
    await run_load(send, Load("burst", clients, clients), short, 1_000_000)
    runs = [await run_load(send, load, sizes, seed) for seed in range(repeat)]
    row = serving_row(load, runs)
    if limit is None or load.kind == "poisson":
        return row
    most = limit.tokens_per_s(int(load.level), sizes.prompt_tokens + sizes.new_tokens / 2)
    rate = row["tokens_per_s"]
    return row | {"limit": most, "share": rate / most if most and isinstance(rate, float) else None}


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of one run."""

    outcomes: Sequence[Outcome]

    @property
    def tokens_per_s(self) -> float:
        """Give output tokens per second from the first request to the last token, without those of failed requests."""
        whole = [outcome for outcome in self.outcomes if not outcome.error]
        if not whole:
            return 0.0
        began_s = min(outcome.due_s for outcome in self.outcomes)
        ended_s = max(outcome.pieces[-1][0] for outcome in whole)
        return sum(outcome.num_tokens for outcome in whole) / (ended_s - began_s)


def serving_row(load: Load, runs: Sequence[Run]) -> Row:
    """Summarize runs of the same load: the median rate, percentiles over the requests of all runs together."""
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    firsts = [outcome.first_s for outcome in outcomes if outcome.first_s is not None]
    gaps = [gap for outcome in outcomes for gap in outcome.gaps_s]
    errors = [outcome.error for outcome in outcomes if outcome.error]
    row: Row = {
        "load": load.kind,
        "level": load.level,
        "requests": len(outcomes),
        "errors": len(errors),
        "repeats": len(runs),
    }
    row |= spread("tokens_per_s", [run.tokens_per_s for run in runs])
    for name, values in (("ttft", firsts), ("gap", gaps)):
        for percent in (50, 99):
            found = percentile(values, percent)
            row[f"{name}_p{percent}_ms"] = None if found is None else found * 1e3
    return row | ({"note": f"first error: {errors[0]}"} if errors else {})
