"""What the peers share: options, prompts, the loads of `mgpu-launch bench serve`, and its rows.

Peers are asked in their own process, without a network between: what they need for that is not counted.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from bench.options import numbers, words
from mgpu.launch.bench.load import Request, Send
from mgpu.launch.bench.report import Report
from mgpu.launch.bench.serve import SHOWN, Sizes, loads, measure_load
from mgpu.launch.bench.shapes import SHAPES

DEADLINE_S = 900.0
"""Longest silence of a peer within one answer."""

Start = Callable[[Request, Callable[[int | Exception | None], None]], None]
"""Begins to answer a request; the callback takes numbers of new tokens from any thread, an error, at last None."""


def parse(doc: str, *more: Callable[[argparse.ArgumentParser], object]) -> argparse.Namespace:
    """Read the options that all peers have; they are those of `mgpu-launch bench serve`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    parser.add_argument("--concurrency", type=numbers, default=[])
    parser.add_argument("--rate", type=lambda text: [float(part) for part in words(text)], default=[])
    parser.add_argument("--burst", type=numbers, default=[])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--save", type=Path)
    for add in more:
        add(parser)
    options = parser.parse_args()
    if not (options.concurrency or options.rate or options.burst):
        options.concurrency = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    return options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what a peer needs that makes a model in place."""
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny", help="random weights of this shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def most_at_once(options: argparse.Namespace) -> int:
    """Return how many requests can be in flight together; at random, all of a run."""
    random_ones = [options.requests] if options.rate else []
    return int(max([*options.concurrency, *options.burst, *random_ones]))


def measure(
    engine: str, send: Send, vocab_size: int, options: argparse.Namespace, *packages: str, **facts: object
) -> None:
    """Put every load on the peer, print and save the rows."""
    asyncio.run(_measure(engine, send, vocab_size, options, packages, facts))


async def _measure(
    engine: str,
    send: Send,
    vocab_size: int,
    options: argparse.Namespace,
    packages: tuple[str, ...],
    facts: dict[str, object],
) -> None:
    sizes = Sizes(options.prompt_tokens, options.new_tokens, vocab_size)
    lengths = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
    report = Report("serve", engine, SHOWN, options.save, *packages, **lengths, **facts)
    for load in loads(options.concurrency, options.rate, options.burst, options.requests):
        report.add(await measure_load(send, load, sizes, options.repeat))


def streamed(start: Start) -> Send:
    """Make a sender of something that reports from another thread."""

    async def send(request: Request) -> AsyncIterator[int]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[int | Exception | None]()

        def notify(what: int | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: after an error nobody reads on
                loop.call_soon_threadsafe(arrived.put_nowait, what)

        start(request, notify)
        while (what := await asyncio.wait_for(arrived.get(), DEADLINE_S)) is not None:
            if isinstance(what, Exception):
                raise what
            yield what

    return send


def need(package: str, error: ImportError) -> SystemExit:
    """Say that a peer is not installed."""
    return SystemExit(f"error: {error}; install it with: {sys.executable} -m pip install {package}")
