"""Kill copies, their parts and the router under compared streams: ``python -m bench.router.kills``.

A small model with random weights runs in copies behind `serve --replicas`, on CPU workers or, with `--device cuda`,
each on GPUs of its own. Streams go on all the time, and each answer is compared, token for token, with that of the
same request before anything was killed. The parent of a copy, its worker, its gateway and the router are killed with
SIGKILL, as often and in the order that `--faults` says, and copies are started again one by one (`roll`).
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from bench.attack.situations import Situation, make_model
from bench.waiting import wait_until
from mgpu import Client, MgpuError
from mgpu.launch.bench.report import Report
from mgpu.launch.server_process import ServerProcess

SHOWN = ("fault", "times", "answers", "lost", "different", "moved", "longest gap, s")
READY_S = 120.0
ROUTER = "mgpu.orchestrator.router"
KINDS = ("parent", "worker", "gateway", "router", "roll")
FAULTS = "parent=13,worker=13,gateway=12,router=12,roll=2"


class Streams:
    """Threads that stream answers one after the other and compare them."""

    def __init__(self, endpoint: str, count: int, num_tokens: int) -> None:
        self._endpoint = endpoint
        self._num_tokens = num_tokens
        self._expected: dict[int, tuple[int, ...]] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.gap_s = 0.0
        with Client(endpoint) as client:
            for seed in range(count):
                self._expected[seed] = client.generate([seed + 5, 9], **self._options(seed)).token_ids
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        with Client(self._endpoint) as client:
            while not self._stopping.is_set():
                try:
                    tokens = self._stream(client, seed)
                except MgpuError as error:
                    if self._stopping.is_set():
                        return
                    self._count("lost")
                    print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
                    continue
                self._count("answers")
                if tokens != self._expected[seed]:
                    self._count("different")

    def _stream(self, client: Client, seed: int) -> tuple[int, ...]:
        tokens: list[int] = []
        last_s = time.monotonic()
        for piece in client.stream([seed + 5, 9], **self._options(seed)):
            now_s = time.monotonic()
            self.gap_s, last_s = max(self.gap_s, now_s - last_s), now_s
            tokens += piece.token_ids
        return tuple(tokens)

    def _options(self, seed: int) -> dict[str, object]:
        """Return the options of a stream's requests: half of them sampled."""
        return {"max_tokens": self._num_tokens, "ignore_eos": True, "seed": seed, "temperature": float(seed % 2)}

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def wait_for_answers(self) -> None:
        """Wait until as many answers have come as there are streams."""
        before = self.counts["answers"]
        wait_until(lambda: self.counts["answers"] >= before + len(self._threads), READY_S)

    def take(self) -> tuple[Counter[str], float]:
        """Return what happened since the last call."""
        with self._lock:
            counts, self.counts = self.counts, Counter()
            gap_s, self.gap_s = self.gap_s, 0.0
        return counts, gap_s

    def stop(self) -> None:
        """Let what still runs count no more, and wait for it."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(20.0)


def victim_of(server: ServerProcess, kind: str, rng: random.Random) -> psutil.Process:
    """Return a process of one of the copies."""
    if kind == "router":
        return next(each for each in psutil.Process(server.process.pid).children() if each.cmdline()[-1] == ROUTER)
    copies = [each for each in psutil.Process(server.process.pid).children() if "serve" in each.cmdline()]
    copy = rng.choice(copies)
    if kind == "parent":
        return copy
    module = "mgpu.worker" if kind == "worker" else "mgpu.orchestrator.gateway"
    return next(each for each in copy.children() if each.cmdline()[-1] == module)


def kill(server: ServerProcess, client: Client, streams: Streams, kind: str, rng: random.Random, count: int) -> None:
    """Kill something whenever all copies are ready, and wait until they are again."""

    def all_ready() -> bool:
        stats, health = client.stats(), client.health()
        return stats["replicas_ready"] == stats["replicas"] and health.layout.count(": ready") == stats["replicas"]

    for _ in range(count):
        victim_of(server, kind, rng).kill()
        time.sleep(0.7)  # what the router knows of it is half a second old
        if not wait_until(all_ready, READY_S):
            raise SystemExit(f"not all copies are ready again {READY_S:g} s after a {kind} was killed")
        streams.wait_for_answers()  # a request that runs in several crashes in a row counts as their cause


def roll(server: ServerProcess, endpoint: str, count: int) -> None:
    """Start the copies again one by one, so many times."""
    for _ in range(count):
        command = [sys.executable, "-m", "mgpu.launch.cli", "roll", "--endpoint", endpoint]
        subprocess.run(command, env=server.environ, check=True, stdout=subprocess.DEVNULL)


def parse_faults(text: str) -> list[tuple[str, int]]:
    """Return kinds and numbers of ``NAME=COUNT,…``. ValueError for others, which argparse tells."""
    faults = [(kind, int(count)) for kind, _, count in (part.partition("=") for part in text.split(","))]
    if unknown := [kind for kind, _ in faults if kind not in KINDS]:
        raise ValueError(unknown)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=parse_faults, default=parse_faults(FAULTS), metavar="NAME=COUNT,…")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100, help="of each answer; few: requests are lost as they begin")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--serve", type=str.split, default=[], metavar="OPTIONS", help="further ones of serve")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    rng, is_good = random.Random(options.seed), True
    with tempfile.TemporaryDirectory(prefix="mgpu-kills-") as folder:
        model = make_model(Path(folder) / "model", Situation(split="."))
        words = ["-m", str(model), "--load-format", "dummy", "--device", options.device]
        words += ["--dtype", "float32"]  # answers are compared, and in bfloat16 the other rows of a step change them
        words += ["--replicas", str(options.replicas), "--kv-memory", "128MiB", "--max-restarts", "1000"]
        with ServerProcess(*words, *options.serve) as server:
            endpoint = server.wait_ready()
            report = Report("kills", "mgpu", SHOWN, options.save)
            streams = Streams(endpoint, options.streams, options.tokens)
            with contextlib.ExitStack() as at_end, Client(endpoint) as client:
                at_end.callback(streams.stop)
                for kind, times in options.faults:
                    before = client.stats()["router_moved"]
                    if kind == "roll":
                        roll(server, endpoint, times)
                    else:
                        kill(server, client, streams, kind, rng, times)
                    moved = max(0.0, client.stats()["router_moved"] - before)  # a new router begins at 0
                    counts, gap_s = streams.take()
                    row = {name: counts[name] for name in ("answers", "lost", "different")}
                    is_good &= not row["lost"] and not row["different"]
                    fault = kind if kind == "roll" else f"SIGKILL of a {kind}"
                    report.add(
                        {"fault": fault, "times": times, **row, "moved": moved, "longest gap, s": round(gap_s, 1)}
                    )
            os.kill(server.process.pid, signal.SIGTERM)
    if not is_good:
        raise SystemExit("streams were lost or different")


if __name__ == "__main__":
    main()
