"""What a router costs: ``python -m bench.router [--requests 20000] [--window 256] [--rounds 5] [--save FILE]``.

Servers without a model (`bench/router/stand_in.py`) stand behind `mgpu-launch route`. Four things are measured:

- requests and tokens for each second of one core: what passes, by the CPU time of the router's process, all of its
  threads. A request of one token is four messages: generate, accepted, tokens, finished. The client reads several
  messages at once, or one by one;
- the time that it adds to a first token: the median of requests one after the other, with it and without it in turns;
- streams: tokens per second of 256 streams of servers that make one token each 100 ms, with it and without it in turns;
- prefix hits: 64 shared beginnings over four servers, each with room for 24 of them, against one cache with room for
  all.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench.router.flood import PROMPT, Flood
from bench.waiting import wait_until
from mgpu import Client
from mgpu.launch.bench.report import Report
from mgpu.protocol.discovery import BASE_VARIABLE, running_servers

NUM_REPLICAS = 4
NUM_PREFIXES = 64
CACHED_PREFIXES = 24
NUM_STREAMS = 256
STEP_MS = 100
ANSWER_TOKENS = 128
ROUTER_MODULE = "mgpu.orchestrator.router"
SHOWN = ("measured", "median", "lowest", "highest", "unit", "wanted")

Say = Callable[[str, Sequence[float], str, str], None]


@contextmanager
def routed(folder: Path, count: int, *words: str) -> Iterator[tuple[list[str], str, psutil.Process]]:
    """Start stand-ins and a router; yield their endpoints, its own, and its process."""
    endpoints = [f"ipc://{folder}/server{at}" for at in range(count)]
    environ = {**os.environ, BASE_VARIABLE: str(folder / "run")}
    started = [subprocess.Popen([sys.executable, "-m", "bench.router.stand_in", each, *words]) for each in endpoints]
    named = [word for each in endpoints for word in ("--replica", each)]
    command = [sys.executable, "-m", "mgpu.launch.cli", "route", *named, "--http", "none", "--log-level", "warning"]
    started.append(subprocess.Popen(command, env=environ))
    try:
        check(wait_until(lambda: bool(running_servers(environ)), 60.0), "the router is not ready")
        endpoint = running_servers(environ)[0].endpoint
        with Client(endpoint) as client:
            check(wait_until(lambda: client.stats()["replicas_ready"] == count, 60.0), "the servers are not found")
        yield endpoints, endpoint, router_of(started[-1])
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)


def router_of(route: "subprocess.Popen[bytes]") -> psutil.Process:
    """Return the process that the messages pass through: a child of that of `mgpu-launch route`."""
    return next(each for each in psutil.Process(route.pid).children() if each.cmdline()[-1] == ROUTER_MODULE)


def check(found: object, problem: str) -> None:
    """Raise SystemExit if what was waited for did not come."""
    if not found:
        raise SystemExit(problem)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure_rates(endpoint: str, router: psutil.Process, options: argparse.Namespace, say: Say) -> None:
    """Measure how much passes for each second of the router's CPU time."""
    rates: defaultdict[tuple[str, bool], list[float]] = defaultdict(list)
    short, long = "requests of one token", f"tokens of answers of {ANSWER_TOKENS}"
    for _ in range(options.rounds):
        for takes_batches in (True, False):
            for what, tokens, count in ((short, 1, options.requests), (long, ANSWER_TOKENS, options.requests // 64)):
                flood = Flood(endpoint, tokens, takes_batches)
                flood.run([PROMPT] * options.window, options.window)
                before_s = cpu_s(router)
                flood.run([PROMPT] * count, options.window)
                rates[what, takes_batches].append(tokens * count / max(1e-9, cpu_s(router) - before_s))
                flood.close()
    for (what, takes_batches), found in rates.items():
        wanted = "20000" if what == short else ""
        say(what if takes_batches else f"{what}, one message each", found, "/s of a core", wanted)


def measure_added(direct: str, through: str, count: int, say: Say) -> None:
    """Measure by how many milliseconds the median request is longer through the router, in five parts of the run."""
    floods = {endpoint: Flood(endpoint) for endpoint in (direct, through)}
    added = []
    for _ in range(5):
        times: dict[str, list[float]] = {direct: [], through: []}
        for _ in range(count // 5):
            for endpoint, flood in floods.items():
                times[endpoint].append(flood.run([PROMPT], 1))
        added.append(1000 * (statistics.median(times[through]) - statistics.median(times[direct])))
    for flood in floods.values():
        flood.close()
    say("added to a first token", added, "ms", "1")


def measure_streams(servers: list[str], through: str, options: argparse.Namespace, say: Say) -> None:
    """Measure the share of the tokens per second that streams keep behind the router."""
    shares = []
    for _ in range(options.rounds):
        direct, routed_too = (_tokens_per_second(each, options.seconds) for each in (servers, [through]))
        shares.append(routed_too / direct)
    say(f"throughput of {NUM_STREAMS} streams", shares, "of direct", "0.98")


def _tokens_per_second(endpoints: list[str], seconds: float) -> float:
    flood = Flood(endpoints[0], 1 << 20)
    floods = [flood, *(Flood(each, 1 << 20) for each in endpoints[1:])]
    for at in range(NUM_STREAMS):
        floods[at % len(floods)].send(PROMPT)
    _count(floods, 1.0)
    before, took_s = sum(each.tokens for each in floods), _count(floods, seconds)
    found = (sum(each.tokens for each in floods) - before) / took_s
    for each in floods:
        each.close()
    return found


def _count(floods: Sequence[Flood], seconds: float) -> float:
    """Count the tokens of all in short turns, so that none are left waiting; return how long that took."""
    began_s = time.perf_counter()
    while time.perf_counter() < began_s + seconds:
        for each in floods:
            each.count(0.01)
    return time.perf_counter() - began_s


def measure_hits(endpoint: str, rounds: int, say: Say) -> None:
    """Measure the share of hits, as a share of those that one cache for all would have."""
    flood, shares = Flood(endpoint), []
    with Client(endpoint) as client:
        for seed in range(rounds):
            before, prompts = client.stats(), _prompts_of(random.Random(seed))
            flood.run(prompts, 16)
            wanted = before["requests"] + len(prompts)
            check(wait_until(lambda wanted=wanted: client.stats()["requests"] >= wanted, 10.0), "no counters")
            time.sleep(1.0)  # they are asked twice a second
            shares.append((client.stats()["hits"] - before["hits"]) / (len(prompts) - NUM_PREFIXES))
    flood.close()
    say("prefix hits", shares, "of one cache", "0.95")


def _prompts_of(rng: random.Random) -> list[bytes]:
    """Return prompts in random order: each of the beginnings twenty times on average."""
    begins = [bytes(rng.randrange(256) if at % 4 != 3 else 0 for at in range(1024)) for _ in range(NUM_PREFIXES)]
    return [rng.choice(begins) + rng.randrange(1000).to_bytes(4, "little") for _ in range(NUM_PREFIXES * 20)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=256, help="requests at the same time")
    parser.add_argument("--pairs", type=int, default=500, help="requests with and without the router")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="for which streams are counted")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    report = Report("router", "mgpu", SHOWN, options.save, "pyzmq", "msgpack")

    def say(what: str, found: Sequence[float], unit: str, wanted: str) -> None:
        values = {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}
        digits = 0 if values["median"] > 100 else 3
        rounded = {name: round(value, digits) for name, value in values.items()}
        report.add({"measured": what, **rounded, "unit": unit, "wanted": wanted})

    with tempfile.TemporaryDirectory(prefix="mgpu-router-") as folder:
        with routed(Path(folder), 1) as (servers, endpoint, process):
            measure_added(servers[0], endpoint, options.pairs, say)
            measure_rates(endpoint, process, options, say)
        with routed(Path(folder), 2, "--step-ms", str(STEP_MS)) as (servers, endpoint, _):
            measure_streams(servers, endpoint, options, say)
        with routed(Path(folder), NUM_REPLICAS, "--cached", str(CACHED_PREFIXES)) as (_, endpoint, _process):
            measure_hits(endpoint, options.rounds, say)


if __name__ == "__main__":
    main()
