"""Kill copies, their parts and the router under compared streams: ``python -m bench.router.kills [--kills 50]``.

A small model with random weights runs in copies behind `serve --replicas`, on CPU workers or, with `--device cuda`,
each on GPUs of its own. Streams go on all the time, and each answer is compared, token for token, with that of the
same request before anything was killed. In turns the parent of a copy, its worker, its gateway and the router are
killed with SIGKILL. At the end the copies are started again one by one (`roll`) twice.
"""

import argparse
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
NUM_TOKENS = 100
ROUTER = "mgpu.orchestrator.router"
KINDS = ("parent", "worker", "gateway", "router")


class Streams:
    """Threads that stream answers one after the other and compare them."""

    def __init__(self, endpoint: str, count: int) -> None:
        self._endpoint = endpoint
        self._expected: dict[int, tuple[int, ...]] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.gap_s = 0.0
        with Client(endpoint) as client:
            for seed in range(count):
                self._expected[seed] = client.generate([seed + 5, 9], **options(seed)).token_ids
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        with Client(self._endpoint) as client:
            while not self._stopping.is_set():
                try:
                    tokens = self._stream(client, seed)
                except MgpuError as error:
                    self._count("lost")
                    print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
                    continue
                self._count("answers")
                if tokens != self._expected[seed]:
                    self._count("different")

    def _stream(self, client: Client, seed: int) -> tuple[int, ...]:
        tokens: list[int] = []
        last_s = time.monotonic()
        for piece in client.stream([seed + 5, 9], **options(seed)):
            now_s = time.monotonic()
            self.gap_s, last_s = max(self.gap_s, now_s - last_s), now_s
            tokens += piece.token_ids
        return tuple(tokens)

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
        self._stopping.set()
        for thread in self._threads:
            thread.join(120.0)


def options(seed: int) -> dict[str, object]:
    """Return the options of a stream's requests: half of them sampled."""
    return {"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": seed, "temperature": float(seed % 2)}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rolls", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    rng, is_good = random.Random(options.seed), True
    with tempfile.TemporaryDirectory(prefix="mgpu-kills-") as folder:
        model = make_model(Path(folder) / "model", Situation(split="."))
        words = [
            "-m",
            str(model),
            "--load-format",
            "dummy",
            "--device",
            options.device,
            "--replicas",
            str(options.replicas),
        ]
        words += ["--dtype", "float32"]  # answers are compared, and in bfloat16 the other rows of a step change them
        with ServerProcess(*words, "--kv-memory", "128MiB", "--max-restarts", "1000") as server:
            endpoint = server.wait_ready()
            streams, report = Streams(endpoint, options.streams), Report("kills", "mgpu", SHOWN, options.save)
            with Client(endpoint) as client:

                def say(fault: str, times: int, moved: float) -> None:
                    nonlocal is_good
                    counts, gap_s = streams.take()
                    row = {name: counts[name] for name in ("answers", "lost", "different")}
                    is_good &= not row["lost"] and not row["different"]
                    report.add(
                        {"fault": fault, "times": times, **row, "moved": moved, "longest gap, s": round(gap_s, 1)}
                    )

                for at, kind in enumerate(KINDS):
                    before = client.stats()["router_moved"]
                    times = options.kills // len(KINDS) + (at < options.kills % len(KINDS))
                    kill(server, client, streams, kind, rng, times)
                    say(f"SIGKILL of a {kind}", times, max(0.0, client.stats()["router_moved"] - before))
                before = client.stats()["router_moved"]
                for _ in range(options.rolls):
                    roll = [sys.executable, "-m", "mgpu.launch.cli", "roll", "--endpoint", endpoint]
                    subprocess.run(roll, env=server.environ, check=True, stdout=subprocess.DEVNULL)
                say("roll", options.rolls, client.stats()["router_moved"] - before)
            streams.stop()
            os.kill(server.process.pid, signal.SIGTERM)
    if not is_good:
        raise SystemExit("streams were lost or different")


if __name__ == "__main__":
    main()
