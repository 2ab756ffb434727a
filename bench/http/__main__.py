"""HTTP against the front channel, on one server in one run: tokens per second, first tokens, idle connections.

    python -m bench.http [--shape 8B] [--model M] [--streams 1,64,256] [--prompt-tokens 128] [--new-tokens 256]
                         [--repeat 5] [--first-tokens 50] [--idle 1000] [--seconds 10] [--save FILE] [-- SERVE OPTIONS]

Rounds of both take turns, so that a machine that slows down slows down both. Prompts are random tokens, new ones in
each round. The load comes from this process: give it a core.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.http.load import FrontLoad, HttpLoad, Timed
from bench.options import numbers
from bench.report import Table
from mgpu.launch.bench.load import random_requests
from mgpu.launch.bench.options import Wanted
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.bench.target import READY_S, prepared, started
from mgpu.protocol.client.async_client import AsyncClient

SHARES = {1: 0.97, 64: 0.97, 256: 0.95}
"""Least tokens per second of HTTP, relative to the front channel, by streams."""
MOST_ADDED_S = 1.5e-3
MOST_IDLE_SHARE = 0.02
Prompts = Callable[[int], list[Sequence[int]]]


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    front: float
    """Of all rounds the one in the middle; so is ``http``."""
    http: float
    unit: str
    front_range: tuple[float, float]
    """Least and greatest."""
    http_range: tuple[float, float]
    http_core: float
    """Busy share of a core of the HTTP process in its rounds."""
    is_good: bool

    @property
    def line(self) -> str:
        verdict = "good" if self.is_good else "MISSED"
        ratio = f" ({self.http / self.front:.1%})" if self.front else ""
        return (
            f"{self.what:<24} front {_with_range(self.front, self.front_range)}, HTTP "
            f"{_with_range(self.http, self.http_range)} {self.unit}{ratio}, process {self.http_core:.0%} of a core: "
            f"{verdict}"
        )


def _with_range(middle: float, ends: tuple[float, float]) -> str:
    return f"{middle:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


class CoreShare:
    """How much of a core a process has used since this was made."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._began_cpu_s, self._began_s = self._cpu_s(), time.monotonic()

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def share(self) -> float:
        return (self._cpu_s() - self._began_cpu_s) / max(time.monotonic() - self._began_s, 1e-9)


def speed(answers: Sequence[Timed]) -> float:
    """Return tokens per second of answers that began together."""
    return sum(each.num_tokens for each in answers) / max(each.end_s for each in answers)


async def measure(
    endpoint: str, url: str, process: psutil.Process, vocabulary: int, wanted: argparse.Namespace
) -> Table[Row]:
    table: Table[Row] = Table(wanted.save, describe())
    seeds = iter(range(10**6))

    def prompts(count: int) -> list[Sequence[int]]:
        made = random_requests(count, wanted.prompt_tokens, wanted.new_tokens, vocabulary, next(seeds))
        return [each.prompt_ids for each in made]

    async with AsyncClient(endpoint, timeout_s=3600, silence_timeout_s=60) as client:
        front, http = FrontLoad(client), HttpLoad(url)
        for load in (front, http):  # compiles, connects
            await load.run(prompts(2), 4)
        table.add(await first_tokens(front, http, process, prompts, wanted.first_tokens))
        for streams in wanted.streams:
            table.add(await throughput(front, http, process, prompts, streams, wanted))
        table.add(await idle(http, process, wanted.idle, wanted.seconds))
        http.close()
    return table


async def first_tokens(front: FrontLoad, http: HttpLoad, process: psutil.Process, prompts: Prompts, count: int) -> Row:
    """Compare the time to the first token of an idle server."""
    took: dict[str, list[float]] = {"front": [], "http": []}
    used = CoreShare(process)
    for _ in range(count):
        for name, load in (("front", front), ("http", http)):
            [answer] = await load.run(prompts(1), 2)
            took[name].append(answer.first_s * 1e3)
    ours, theirs = (statistics.median(took[name]) for name in ("front", "http"))
    ranges = (_quartiles(took["front"]), _quartiles(took["http"]))
    is_good = theirs - ours <= MOST_ADDED_S * 1e3
    return Row("first token (quartiles)", ours, theirs, "ms", *ranges, used.share(), is_good)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    found = statistics.quantiles(values, n=4)
    return found[0], found[2]


async def throughput(
    front: FrontLoad,
    http: HttpLoad,
    process: psutil.Process,
    prompts: Prompts,
    streams: int,
    wanted: argparse.Namespace,
) -> Row:
    speeds: dict[str, list[float]] = {"front": [], "http": []}
    shares: list[float] = []
    for _ in range(wanted.repeat):
        for name, load in (("front", front), ("http", http)):
            asked, used = prompts(streams), CoreShare(process)
            speeds[name].append(speed(await load.run(asked, wanted.new_tokens)))
            shares += [used.share()] if name == "http" else []
    ours, theirs = statistics.median(speeds["front"]), statistics.median(speeds["http"])
    ranges = [(min(each), max(each)) for each in speeds.values()]
    is_good = theirs >= ours * SHARES.get(streams, 0.95)
    return Row(f"{streams} streams", ours, theirs, "tokens/s", *ranges, statistics.median(shares), is_good)


async def idle(http: HttpLoad, process: psutil.Process, count: int, seconds: float) -> Row:
    """Measure what connections cost that do nothing, as percent of a core; "front" is the same without them."""

    async def percent() -> float:
        used = CoreShare(process)
        await asyncio.sleep(seconds)
        return used.share() * 100

    without = await percent()
    await http.open(count)
    for_all = await percent()
    ranges = ((without, without), (for_all, for_all))
    is_good = for_all < MOST_IDLE_SHARE * 100
    return Row(f"{count} idle connections", without, for_all, "% of a core", *ranges, for_all / 100, is_good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--shape")
    parser.add_argument("--streams", type=numbers, default=[1, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--first-tokens", type=int, default=50)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--save", type=Path)
    parser.add_argument("serve_options", nargs="*")
    wanted = parser.parse_args()
    options = (*wanted.serve_options, "--http", "127.0.0.1:0")
    with prepared(Wanted(wanted.model, wanted.shape, "1GB/s", 1, None, options)) as target, started(target) as server:
        endpoint, url = server.wait_ready(READY_S), server.http_url()
        family = psutil.Process(server.process.pid).children(recursive=True)
        [http] = [each for each in family if each.cmdline()[-1:] == ["mgpu.orchestrator.http"]]
        print(heading(describe()))
        print(f"{target.name}: prompts of {wanted.prompt_tokens}, answers of {wanted.new_tokens} tokens")
        table = asyncio.run(measure(endpoint, url, http, target.plan.facts.vocab_size, wanted))
    return 0 if table.is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
