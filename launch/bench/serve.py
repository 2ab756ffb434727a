"""``mgpu-launch bench serve``: clients at random, or each waiting for its answer, through the front channel.

The loads and their rows serve the peers of ``bench/peers`` as well.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import click

from mgpu.launch.bench.limit import Limit
from mgpu.launch.bench.load import Outcome, Request, Send, closed_loop, open_loop, poisson_arrivals, random_requests
from mgpu.launch.bench.options import Wanted, list_option, rates, target_options
from mgpu.launch.bench.report import Report, Row, percentile, spread
from mgpu.launch.bench.target import SILENCE_S, TIMEOUT_S, Target, prepared, serving
from mgpu.launch.settings.config import ServeConfig
from mgpu.protocol.client.async_client import AsyncClient

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROOM_OPTION = "--max-client-requests"
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


@click.command("serve", short_help="Serve many clients: speed and waiting times.")
@target_options
@list_option("--concurrency", "", "Closed loop: this many clients, each waiting for its answer.")
@click.option("--rate", default="", metavar="X,X,…", callback=rates, help="Poisson arrivals: requests per second.")
@list_option("--burst", "", "This many requests, all at once.")
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests of each run; at least 4 a client.",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=256, show_default=True)
def serve_bench_command(
    wanted: Wanted,
    concurrency: tuple[int, ...],
    rate: tuple[float, ...],
    burst: tuple[int, ...],
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
) -> None:
    """Serve clients through the front channel: tokens per second, time to first token, waits between tokens.

    Without --concurrency, --rate and --burst: closed loops of 1 to 256 clients. A gap is what a reader waits between
    two arrivals; the limit is that of decoding alone.
    """
    if not (concurrency or rate or burst):
        concurrency = CONCURRENCY
    todo = loads(concurrency, rate, burst, requests)
    with prepared(with_room_for(wanted, max(load.count for load in todo))) as target, serving(target) as endpoint:
        sizes = Sizes(prompt_tokens, new_tokens, target.plan.facts.vocab_size)
        lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        report = Report("serve", "mgpu", SHOWN, wanted.save, "pyzmq", "triton", **lengths, **target.facts)
        asyncio.run(measure(report, target, endpoint, todo, sizes, wanted.repeat))


def with_room_for(wanted: Wanted, requests: int) -> Wanted:
    """Let this one client have so many requests in flight, unless the user said how many."""
    if requests <= ServeConfig().max_client_requests or ROOM_OPTION in wanted.serve_options:
        return wanted
    return replace(wanted, serve_options=(*wanted.serve_options, ROOM_OPTION, str(requests)))


async def measure(
    report: Report, target: Target, endpoint: str, todo: Sequence[Load], sizes: Sizes, repeat: int
) -> None:
    """Put every load on the server, one after the other."""
    async with AsyncClient(endpoint, timeout_s=TIMEOUT_S, silence_timeout_s=SILENCE_S) as client:

        async def send(request: Request) -> AsyncIterator[int]:
            options = {"max_tokens": request.new_tokens, "ignore_eos": True}
            async with client.stream(request.prompt_ids, **options) as pieces:  # type: ignore[arg-type]
                async for piece in pieces:
                    yield len(piece.token_ids)

        for load in todo:
            report.add(await measure_load(send, load, sizes, repeat, target.limit))


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
        """Return output tokens per second from the first request to the last token, without failed requests."""
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
