"""Break a real server under streams over HTTP and count what their clients lose.

    python -m bench.http.chaos [--streams 8] [--kills 3] [--gone 1000] [--model demo] [--save FILE]

Each stream is compared with the same request undisturbed. A killed worker or gateway may cost nothing. A killed HTTP
process ends its streams: each must end at once and as an error, not as if it were whole, and the next process serves.
Clients that go leave nothing. After every row no KV block is held.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from bench.report import Table
from bench.waiting import wait_until
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.server_process import ServerProcess
from mgpu.protocol.client.client import Client

TIMEOUT_S = 120.0
BACK_S = 10.0
"""Until blocks are free, and until a process that was replaced serves."""
NEW_TOKENS = 48
WAVE = 50
WORKER, GATEWAY, HTTP = "mgpu.worker", "mgpu.orchestrator.gateway", "mgpu.orchestrator.http"


@dataclass
class Row:
    """What one kind of fault cost."""

    fault: str
    injected: int = 0
    streams: int = 0
    whole: int = 0
    """Streams with the text that they have undisturbed."""
    failed: int = 0
    """Streams that ended as an error."""
    longest_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.problems

    @property
    def line(self) -> str:
        return (
            f"| {self.fault} | {self.injected:,} | {self.streams:,} | {self.whole:,} | {self.failed:,} | "
            f"{self.longest_s:.1f} s | {'; '.join(self.problems) or 'good'} |"
        )


class Server:
    """A server and its processes."""

    def __init__(self, process: ServerProcess) -> None:
        self._process = process
        self.endpoint, self.url = process.wait_ready(), process.http_url()

    def kill(self, module: str) -> None:
        """SIGKILL the processes of a module."""
        for child in psutil.Process(self._process.process.pid).children(recursive=True):
            if module in child.cmdline():
                child.kill()

    def connect(self) -> HTTPConnection:
        parts = urlsplit(self.url)
        return HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)

    def answer(self, prompt: str, begun: Callable[[], object] = lambda: None) -> str:
        """Return the text of a stream. OSError or HTTPException if it breaks off, ValueError for one without an end."""
        connection = self.connect()
        try:
            body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            lines = [response.readline()]
            begun()
            lines += response.read().splitlines()
        finally:
            connection.close()
        events = [line[6:].strip() for line in lines if line.startswith(b"data: ")]
        if not events or events[-1] != b"[DONE]":
            raise ValueError(events[-1:])
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def kill(server: Server, module: str, texts: dict[str, str], count: int) -> Row:
    """Kill the processes of ``module`` under all streams, ``count`` times."""
    row = Row(f"SIGKILL of {module.rpartition('.')[2]}")
    for _ in range(count):
        ready = threading.Barrier(len(texts) + 1, timeout=TIMEOUT_S)
        with ThreadPoolExecutor(len(texts)) as pool:
            streams = {prompt: pool.submit(server.answer, prompt, ready.wait) for prompt in texts}
            ready.wait()
            began_s = time.monotonic()
            server.kill(module)
            row.injected += 1
            for prompt, stream in streams.items():
                row.streams += 1
                try:
                    row.whole += stream.result(TIMEOUT_S) == texts[prompt]
                except (OSError, HTTPException, ValueError):
                    row.failed += 1
        row.longest_s = max(row.longest_s, time.monotonic() - began_s)
        if not wait_until(lambda: _serves(server), BACK_S * 6):
            row.problems.append("the next request was not served")
    expected = 0 if module != HTTP else row.streams
    if row.whole + row.failed != row.streams or row.failed > expected:
        row.problems.append(f"{row.streams - row.whole} streams were not whole")
    return row


def leave(server: Server, count: int) -> Row:
    """Open ``count`` streams and close their connections, half of them before anything has come."""
    row = Row("clients gone", count, count)
    body = json.dumps({"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True})
    for first in range(0, count, WAVE):
        opened = [server.connect() for _ in range(min(WAVE, count - first))]
        for number, connection in enumerate(opened):
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            if number % 2:
                connection.getresponse().readline()
        for connection in opened:
            connection.close()
    return row


def _serves(server: Server) -> bool:
    try:
        return bool(server.answer("Once"))
    except (OSError, HTTPException, ValueError):
        return False


def check_blocks(server: Server, row: Row) -> Row:
    with Client(server.endpoint) as client:
        began_s = time.monotonic()
        if not wait_until(lambda: client.stats()["kv_blocks_used"] == 0, BACK_S):
            row.problems.append(f"{client.stats()['kv_blocks_used']:g} blocks are held after {BACK_S:g} s")
        row.longest_s = row.longest_s or time.monotonic() - began_s
    return row


def rows(server: Server, wanted: argparse.Namespace) -> Iterator[Row]:
    prompts = [f"{number} little birds sat on a tree, and" for number in range(wanted.streams)]
    with ThreadPoolExecutor(wanted.streams) as pool:
        texts = dict(zip(prompts, pool.map(server.answer, prompts), strict=True))
    faults = [partial(kill, server, module, texts, wanted.kills) for module in (WORKER, GATEWAY, HTTP)]
    for fault in (*faults, partial(leave, server, wanted.gone)):
        yield check_blocks(server, fault())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--gone", type=int, default=1000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--save", type=Path)
    wanted = parser.parse_args()
    facts = describe()
    table: Table[Row] = Table(wanted.save, facts)
    # Answers are compared, and in bfloat16 the other rows of a step change them.
    options = ("--dtype", "float32", "--max-seq-len", "1024", "--max-restarts", "1000", "--http", "127.0.0.1:0")
    with ServerProcess("-m", wanted.model, *options) as process:
        server = Server(process)
        table.say(f"{heading(facts)}\n\n| fault | injected | streams | whole | failed | longest | |")
        table.say("| --- | --- | --- | --- | --- | --- | --- |")
        for row in rows(server, wanted):
            table.add(row)
    return 0 if table.is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
