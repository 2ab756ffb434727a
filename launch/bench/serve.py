"""``mgpu-launch bench serve``: clients at random, or each waiting for its answer, through the front channel."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import click

from mgpu.launch.bench.load import Request
from mgpu.launch.bench.numbers import list_option, rates
from mgpu.launch.bench.report import Report
from mgpu.launch.bench.serving import SHOWN, Load, Sizes, loads, measure_load
from mgpu.launch.bench.session import SILENCE_S, TIMEOUT_S, serving
from mgpu.launch.bench.target import Target, Wanted, prepared, target_options
from mgpu.launch.config import ServeConfig
from mgpu.protocol.client.async_client import AsyncClient

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROOM_OPTION = "--max-client-requests"


@click.command("serve")
@target_options
@list_option("--concurrency", "", "Closed loop: so many clients wait for their answers.")
@click.option("--rate", default="", metavar="X,X,…", callback=rates, help="Poisson arrivals: requests per second.")
@list_option("--burst", "", "So many requests, all at once.")
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True, help="Per run; at least 4 a client.")
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
