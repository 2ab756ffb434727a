"""What a router costs: ``python -m bench.router [--requests 20000] [--window 64] [--save FILE]``.

Servers that answer at once stand behind `mgpu-launch route`. Three things are measured:

- requests per second of one core: the requests, by the CPU time that the router's process took for them;
- the time that it adds to a first token: the median of requests one after the other, with it and without it in turns;
- prefix hits: 64 shared beginnings over four servers, against the hits of one server with a cache for all.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import psutil
import zmq

from bench.waiting import wait_until
from mgpu import Client
from mgpu.launch.bench.report import Report
from mgpu.protocol.discovery import BASE_VARIABLE, running_servers
from mgpu.protocol.front import framing

NUM_REPLICAS = 4
NUM_PREFIXES = 64
SHOWN = ("measured", "value", "unit", "target")


@contextmanager
def routed(folder: Path, count: int) -> Iterator[tuple[list[str], str, psutil.Process]]:
    """Start stand-ins and a router; yield their endpoints, its own, and its process."""
    endpoints = [f"ipc://{folder}/server{at}" for at in range(count)]
    environ = {**os.environ, BASE_VARIABLE: str(folder / "run")}
    started = [subprocess.Popen([sys.executable, "-m", "bench.router.stand_in", each]) for each in endpoints]
    words = [word for each in endpoints for word in ("--replica", each)]
    command = [sys.executable, "-m", "mgpu.launch.cli", "route", *words, "--http", "none", "--log-level", "warning"]
    started.append(subprocess.Popen(command, env=environ))
    try:
        check(wait_until(lambda: bool(running_servers(environ)), 60.0), "the router is not ready")
        endpoint = running_servers(environ)[0].endpoint
        with Client(endpoint) as client:
            check(wait_until(lambda: client.stats()["replicas_ready"] == count, 60.0), "the servers are not found")
        yield endpoints, endpoint, psutil.Process(started[-1].pid)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)


def check(found: object, problem: str) -> None:
    """Raise SystemExit if what was waited for did not come."""
    if not found:
        raise SystemExit(problem)


class Flood:
    """Requests over one connection, so many in flight at the same time."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        framing.set_client_options(self._socket, endpoint)
        self._socket.connect(endpoint)
        self._number = 0

    def run(self, prompts: list[bytes], window: int) -> float:
        """Send one request for each prompt; return the seconds until the last has ended."""
        began_s, left = time.perf_counter(), iter(prompts)
        flying = sum(self._send(next(left, None)) for _ in range(window))
        while flying:
            if not self._socket.poll(30_000):
                raise SystemExit("no answer for 30 s")
            message: dict[str, Any] = msgpack.unpackb(self._socket.recv_multipart()[1])
            if message["type"] == "failed":
                raise SystemExit(f"a request failed: {message}")
            if message["type"] == "finished":
                flying += self._send(next(left, None)) - 1
        return time.perf_counter() - began_s

    def _send(self, prompt: bytes | None) -> int:
        if prompt is None:
            return 0
        self._number += 1
        request = {"type": "generate", "id": self._number, "prompt_ids": prompt, "max_tokens": 1, "stream": True}
        self._socket.send_multipart(framing.pack(request))
        return 1

    def close(self) -> None:
        self._socket.close()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure_rate(flood: Flood, router: psutil.Process, count: int, window: int) -> float:
    """Return the requests for each second of the router's CPU time."""
    flood.run([b"\x05\0\0\0"] * window, window)
    before = cpu_s(router)
    flood.run([b"\x05\0\0\0"] * count, window)
    return count / max(1e-9, cpu_s(router) - before)


def measure_added_ms(direct: str, through: str, count: int) -> float:
    """Return by how many milliseconds the median request is longer through the router."""
    times: dict[str, list[float]] = {direct: [], through: []}
    floods = {endpoint: Flood(endpoint) for endpoint in times}
    for _ in range(count):
        for endpoint, flood in floods.items():
            times[endpoint].append(flood.run([b"\x05\0\0\0"], 1))
    for flood in floods.values():
        flood.close()
    return 1000 * (statistics.median(times[through][5:]) - statistics.median(times[direct][5:]))


def measure_hits(flood: Flood, endpoint: str, seed: int) -> float:
    """Return the share of hits, as a share of those that one cache for all would have."""
    rng = random.Random(seed)
    prefixes = [rng.randbytes(1024).replace(b"\xff", b"\x01") for _ in range(NUM_PREFIXES)]
    begins = [bytes(byte & 0x7F if at % 4 == 3 else byte for at, byte in enumerate(each)) for each in prefixes]
    prompts = [rng.choice(begins) + rng.randrange(1000).to_bytes(4, "little") for _ in range(NUM_PREFIXES * 20)]
    with Client(endpoint) as client:
        before = client.stats()["hits"]
        flood.run(prompts, 16)
        check(wait_until(lambda: client.stats()["requests"] >= len(prompts), 10.0), "the counters are not told")
        time.sleep(1.0)  # they are asked twice a second
        return (client.stats()["hits"] - before) / (len(prompts) - NUM_PREFIXES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=64, help="requests at the same time")
    parser.add_argument("--pairs", type=int, default=200, help="requests with and without the router")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    report = Report("router", "mgpu", SHOWN, options.save, "pyzmq", "msgpack")

    def say(what: str, value: float, unit: str, target: str) -> None:
        report.add({"measured": what, "value": round(value, 3), "unit": unit, "target": target})

    with tempfile.TemporaryDirectory(prefix="mgpu-router-") as folder:
        with routed(Path(folder), 1) as (servers, endpoint, process):
            say("added to a first token", measure_added_ms(servers[0], endpoint, options.pairs), "ms", "1")
            flood = Flood(endpoint)
            say("requests", measure_rate(flood, process, options.requests, options.window), "/s of a core", "20000")
            flood.close()
        with routed(Path(folder), NUM_REPLICAS) as (_, endpoint, _process):
            flood = Flood(endpoint)
            say("prefix hits of one cache's", measure_hits(flood, endpoint, 1), "", "0.95")
            flood.close()


if __name__ == "__main__":
    main()
