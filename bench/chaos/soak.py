"""Mixed load for a while: memory, descriptors, shared memory and blocks of the server must stay flat.

Beside the streams that are compared with undisturbed runs, clients come and go, chat, cancel, vanish and ask for what
is refused. The slopes are those of straight lines through the second half of the samples.
"""

import random
import statistics
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
import zmq

from bench.chaos.ends import ask
from bench.chaos.load import Streams
from bench.chaos.server import Server, shared_memory
from bench.chaos.table import Row
from mgpu import Client
from mgpu.protocol.errors import MgpuError

SAMPLE_S = 5.0
LARGEST_SLOPE = {"RSS, KB": 100.0, "descriptors": 0.1, "threads": 0.1, "/dev/shm entries": 0.1, "KV blocks": 1.0}
"""Per minute, over the second half; 100 KB/min is 6 MB an hour."""
LARGEST_OF_WORKERS = 0.001
"""Per minute, of a worker's RSS: glibc's heap settles slowly under batches of every shape."""
SHORTEST_MIN = 10.0
"""A shorter run only prints its slopes: caches, the journal's minute and the allocator are not settled."""


@dataclass
class Samples:
    """What was measured over time, by what and of which process."""

    values: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)

    def take(self, server: Server, client: Client, at_min: float) -> None:
        """Look at every process and at the pool once."""
        with suppress(psutil.NoSuchProcess):
            for name, process in server.everyone().items():
                self._add("RSS, KB", name, at_min, process.memory_info().rss / 1024)
                self._add("descriptors", name, at_min, process.num_fds())
                self._add("threads", name, at_min, process.num_threads())
        self._add("/dev/shm entries", "machine", at_min, len(shared_memory()))
        with suppress(MgpuError):
            self._add("KV blocks", "held", at_min, client.stats()["kv_blocks_used"])

    def _add(self, what: str, whose: str, at_min: float, value: float) -> None:
        self.values.setdefault((what, whose), []).append((at_min, value))

    def slopes(self) -> dict[tuple[str, str], float]:
        """Return the change per minute over the second half."""
        found = {}
        for key, points in self.values.items():
            later = points[len(points) // 2 :]
            if len(later) > 1:
                times, values = zip(*later, strict=True)
                found[key] = statistics.linear_regression(times, values).slope
        return found

    def bound(self, what: str, whose: str) -> float:
        """Return the largest slope that counts as flat."""
        if what.startswith("RSS") and whose.startswith("worker"):
            return LARGEST_OF_WORKERS * self.values[what, whose][-1][1]
        return LARGEST_SLOPE[what]

    def lines(self) -> list[str]:
        """Return a table: first, middle and last value, and the slope."""
        lines = ["| what | of | at first | half way | at last | per minute, second half |", "| --- " * 6 + "|"]
        for (what, whose), slope in self.slopes().items():
            points = [value for _, value in self.values[what, whose]]
            numbers = " | ".join(f"{points[at]:.0f}" for at in (0, len(points) // 2, -1))
            lines.append(f"| {what} | {whose} | {numbers} | {slope:+.2f} |")
        return lines

    def raw(self) -> list[str]:
        """Return the RSS of every process, one value a minute, to show how it settles."""
        each_min = max(1, round(60 / SAMPLE_S))
        rss = {whose: points for (what, whose), points in self.values.items() if what.startswith("RSS")}
        return [
            f"RSS of {whose}, MB: {[round(v / 1024) for _, v in points[::each_min]]}" for whose, points in rss.items()
        ]


def soak(server: Server, streams: Streams, minutes: float) -> Row:
    """Keep the load up and take samples."""
    row = Row(f"{minutes:g} minutes of mixed load")
    fill_up(server)
    others = Others(server.endpoint)
    samples = Samples()
    began_s = time.monotonic()
    others.start()
    with Client(server.endpoint, silence_timeout_s=120.0) as client:
        while (at_min := (time.monotonic() - began_s) / 60) < minutes:
            samples.take(server, client, at_min)
            if len(samples.values["threads", "parent"]) % 12 == 0:
                row.injected(count=0)
            time.sleep(SAMPLE_S)
    others.stop()
    row.injections = 1
    row.problems += others.problems
    for (what, whose), slope in samples.slopes().items():
        if minutes >= SHORTEST_MIN and abs(slope) > samples.bound(what, whose):
            row.problems.append(f"{what} of {whose}: {slope:+.2f} per minute")
    row.notes += [
        *samples.lines(),
        *samples.raw(),
        f"beside the streams: {others.counts}, {streams.pieces} pieces streamed",
    ]
    return row


def fill_up(server: Server) -> None:
    """Run a wider and longer batch than any later one: workers keep the memory of their largest."""
    with Client(server.endpoint, silence_timeout_s=120.0) as client:
        prompts = [[3 + number, *range(3, 252)] for number in range(24)]
        streams = [client.stream(prompt, max_tokens=40, ignore_eos=True) for prompt in prompts]
        for stream in streams:
            stream.completion()


class Others:
    """Three threads with clients of every other kind."""

    def __init__(self, endpoint: str) -> None:
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}
        self._endpoint = endpoint
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(3)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(240)

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = (self._chat, self._text, self._cancel, self._refused, self._vanish, self._ask_for_state)
        while not self._over.is_set():
            kind = rng.choice(kinds)
            name = kind.__name__.strip("_")
            try:
                kind(rng)
                self.counts[name] = self.counts.get(name, 0) + 1
            except Exception as error:  # whatever it is, it is what this program is looking for
                self.problems.append(f"{name}: {type(error).__name__}: {error}")
                time.sleep(0.5)
            self._over.wait(rng.expovariate(2.0))

    def _client(self) -> Client:
        return Client(self._endpoint, silence_timeout_s=120.0)

    def _chat(self, rng: random.Random) -> None:
        with self._client() as client:
            messages = [{"role": "user", "content": "Count to " + str(rng.randrange(1000))}]
            client.chat(messages, max_tokens=rng.randrange(1, 40), temperature=rng.choice([0.0, 0.9]))

    def _text(self, rng: random.Random) -> None:
        words = " ".join(
            rng.choice(["one", "two", "red", "blue", "Ägypten", "日本"]) for _ in range(rng.randrange(1, 60))
        )
        with self._client() as client:
            client.generate(words, max_tokens=24, n=rng.choice([1, 2]), stop=["\n", "blue"], temperature=0.7, top_k=40)

    def _cancel(self, rng: random.Random) -> None:
        with self._client() as client, client.stream([rng.randrange(3, 40000)] * 20, max_tokens=200) as stream:
            for _ in range(rng.randrange(1, 6)):
                next(stream, None)

    def _refused(self, rng: random.Random) -> None:
        with self._client() as client:
            for options in ({"max_tokens": 100_000}, {"temperature": -1.0}, {"n": 10**9}):
                try:
                    client.generate([3] * rng.randrange(1, 9), **options)
                except MgpuError:
                    continue
                self.problems.append(f"{options} was not refused")

    def _vanish(self, rng: random.Random) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = ask(context, self._endpoint, rng.randrange(20_000))
        for _ in range(rng.randrange(1, 4)):
            if socket.poll(120_000):
                socket.recv_multipart()
        socket.close()
        context.term()

    def _ask_for_state(self, rng: random.Random) -> None:
        with self._client() as client:
            client.health()
            client.stats()
            client.models()
