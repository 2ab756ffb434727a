"""What many and hostile connections cost the HTTP process: its memory and CPU time, and whether others are served.

    python -m bench.http.connections [--idle 1000] [--many 10000] [--slow 1000] [--bodies 20] [--seconds 5]

A server with random weights runs for it (or ``--url URL --pid PID``: that HTTP process). Each row is good if the next
request is served while the connections are open, and afterwards the process holds about what it held before. The limit
of open files of this process is raised as far as the system allows.
"""

import argparse
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from bench.report import Table
from bench.waiting import wait_until
from mgpu.launch.bench.options import Wanted
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.bench.target import READY_S, prepared, started

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
BODY_BYTES = 100 << 20
MOST_IDLE_SHARE = 0.02
"""Of a core, for idle connections."""
KEPT_BYTES = 48 << 20
"""What the process may hold more than before: the allocator keeps some of what was used."""
OWN_FILES = 200
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Row:
    """What some connections cost."""

    what: str
    count: int
    cpu_percent: float
    """Of a core, while they were open."""
    grown_mib: float
    """Memory while they were open, beyond that before."""
    kept_mib: float
    """The same after they were closed."""
    served_ms: float
    """The next request while they were open; infinity if it was not served."""
    is_good: bool

    @property
    def line(self) -> str:
        return (
            f"| {self.what} | {self.count:,} | {self.cpu_percent:.1f} % | {self.grown_mib:.1f} | {self.kept_mib:.1f} | "
            f"{self.served_ms:.1f} ms | {'good' if self.is_good else 'MISSED'} |"
        )


class Server:
    """The HTTP process that is measured."""

    def __init__(self, url: str, pid: int) -> None:
        parts = urlsplit(url)
        self.address = (parts.hostname or "", parts.port or 80)
        self.process = psutil.Process(pid)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=TIMEOUT_S)

    def serve_one(self) -> float:
        """Return how long a new connection and its request take, in ms; infinity if it is not served."""
        began_s = time.monotonic()
        connection = HTTPConnection(*self.address, timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            response.read()
            return (time.monotonic() - began_s) * 1e3 if response.status == 200 else float("inf")
        except (OSError, HTTPException):
            return float("inf")
        finally:
            connection.close()

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def resident(self) -> int:
        return int(self.process.memory_info().rss)


def measure(
    server: Server, what: str, count: int, attack: Callable[[Server, int], object], seconds: float, most_share: float
) -> Row:
    """Hold what ``attack`` opens for some seconds, serve a request beside it, close it, and wait for the memory."""
    server.serve_one()
    before = server.resident()
    with ExitStack() as opened:
        connections = attack(server, count)
        if isinstance(connections, list):
            for connection in connections:
                opened.enter_context(connection)
        began_s, began_cpu_s = time.monotonic(), server.cpu_s()
        time.sleep(seconds)
        share = (server.cpu_s() - began_cpu_s) / (time.monotonic() - began_s)
        grown, served_ms = server.resident() - before, server.serve_one()
    wait_until(lambda: server.resident() - before < KEPT_BYTES, TIMEOUT_S)
    kept = server.resident() - before
    is_good = served_ms < float("inf") and kept < KEPT_BYTES and share < most_share
    return Row(what, count, share * 100, grown / 2**20, kept / 2**20, served_ms, is_good)


def idle(server: Server, count: int) -> list[socket.socket]:
    """Open connections that send nothing after a first request."""
    opened = [server.connect() for _ in range(count)]
    for connection in opened:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
    for connection in opened:
        connection.recv(4096)
    return opened


def silent(server: Server, count: int) -> list[socket.socket]:
    """Open connections that send nothing at all."""
    return [server.connect() for _ in range(count)]


def slow(server: Server, count: int) -> list[socket.socket]:
    """Send beginnings of heads whose ends never come."""
    opened = [server.connect() for _ in range(count)]
    for connection in opened:
        connection.sendall(HEAD + b"x-slow: ")
    return opened


def slow_bodies(server: Server, count: int) -> list[socket.socket]:
    """Promise bodies of 1 MiB and send 64 KiB of each."""
    opened = [server.connect() for _ in range(count)]
    for connection in opened:
        connection.sendall(HEAD + b"content-length: 1048576\r\n\r\n" + b" " * 65536)
    return opened


def half_closed(server: Server, count: int) -> list[socket.socket]:
    """Ask for streams and close the sending half."""
    body = b'{"prompt": [5], "max_tokens": 400, "ignore_eos": true, "stream": true}'
    opened = [server.connect() for _ in range(count)]
    for connection in opened:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
    return opened


def large_bodies(server: Server, count: int) -> None:
    """Send bodies of 100 MiB, one after the other, as far as they are taken."""
    for number in range(count):
        with server.connect() as connection, suppress(OSError):
            connection.sendall(HEAD + (b"transfer-encoding: chunked\r\n\r\n" if number % 2 else b""))
            if number % 2 == 0:
                connection.sendall(b"content-length: %d\r\n\r\n" % BODY_BYTES)
            piece = b" " * (1 << 20)
            for _ in range(BODY_BYTES >> 20):
                connection.sendall(b"100000\r\n" + piece + b"\r\n" if number % 2 else piece)


def rows(server: Server, wanted: argparse.Namespace) -> Iterator[Row]:
    kinds: Sequence[tuple[str, int, Callable[[Server, int], object], float]] = (
        ("idle after a request", wanted.idle, idle, MOST_IDLE_SHARE),
        ("open, nothing sent", wanted.many, silent, 1.0),
        ("a head that does not end", wanted.slow, slow, 1.0),
        ("a body that does not end", wanted.slow, slow_bodies, 1.0),
        ("half-closed streams", min(wanted.slow, 200), half_closed, 1.0),
        ("bodies of 100 MiB", wanted.bodies, large_bodies, 1.0),
    )
    for what, count, attack, most_share in kinds:
        yield measure(server, what, count, attack, wanted.seconds, most_share)


@contextmanager
def many_files() -> Iterator[int]:
    """Raise the limit of open files inside the block; yield how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard - OWN_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def run(server: Server, wanted: argparse.Namespace) -> Table[Row]:
    facts = describe("uvicorn", "uvloop", "starlette")
    table: Table[Row] = Table(wanted.save, facts)
    table.say(f"{heading(facts)}\n\n| connections | count | CPU | MiB more | MiB after | next request | |")
    table.say("| --- | --- | --- | --- | --- | --- | --- |")
    with many_files() as most:
        wanted.many = min(wanted.many, most)
        for row in rows(server, wanted):
            table.add(row)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("idle", 1000), ("many", 10_000), ("slow", 1000), ("bodies", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--url")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--save", type=Path)
    wanted = parser.parse_args()
    if wanted.url:
        return 0 if run(Server(wanted.url, wanted.pid), wanted).is_good else 1
    options = ("--device", "cpu", "--http", "127.0.0.1:0")
    with prepared(Wanted("", "tiny", "1GB/s", 1, None, options)) as target, started(target) as server:
        server.wait_ready(READY_S)
        family = psutil.Process(server.process.pid).children(recursive=True)
        [http] = [each for each in family if each.cmdline()[-1:] == ["mgpu.orchestrator.http"]]
        return 0 if run(Server(server.http_url(), http.pid), wanted).is_good else 1


if __name__ == "__main__":
    sys.exit(main())
