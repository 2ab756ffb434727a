"""Compare copies behind one endpoint with single servers on the same devices: ``python -m bench.router.copies``.

A server with one copy on each GPU (`serve --replicas`) and single servers on the same GPUs are started together with
random weights, and asked in turns, so that what the machine does otherwise meets both:

- decoding: 128 streams for each GPU, tokens per second while all of them run, through the router and without it;
- shared beginnings: requests with one of 64 beginnings of 2,048 tokens and some tokens of their own, 128 at the same
  time for each GPU. All copies through the router against one single server, and the share of prompt tokens that were
  in a cache. Each turn has its own beginnings, so that computing them once is part of it.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.model_shapes import SHAPES, SMALL_SHAPES, write_config
from bench.multi_gpu.box import find_box, serving
from bench.router.load_process import LoadProcesses, Share, rate_while_all_run, seconds_of
from mgpu import Client
from mgpu.launch.bench.load import Outcome, Request, random_requests
from mgpu.launch.bench.report import Report
from mgpu.protocol.checkpoint.read import read_checkpoint

SHOWN = ("measured", "median", "lowest", "highest", "unit", "wanted")
PROCESSES_PER_DEVICE = 2
PREFIXES = 64
READY_S = 150.0


@dataclass(frozen=True)
class Effort:
    """How much is asked, for each device."""

    streams: int
    prompt_tokens: int
    new_tokens: int
    prefix_tokens: int
    own_tokens: int
    answer_tokens: int
    requests_per_prefix: int


REAL = Effort(128, 128, 512, 2048, 64, 16, 10)
REHEARSED = Effort(4, 16, 400, 48, 8, 4, 1)


@dataclass(frozen=True)
class Servers:
    """The endpoints of all copies together and of each single server."""

    routed: str
    single: Sequence[str]
    vocab_size: int


class Comparison:
    """Asks both in turns."""

    def __init__(self, servers: Servers, processes: LoadProcesses, effort: Effort, rounds: int) -> None:
        self._servers, self._processes, self._effort, self._rounds = servers, processes, effort, rounds
        self._seed = 0

    def decoding(self) -> tuple[list[float], list[float]]:
        """Return tokens per second of all devices, through the router and without it."""
        routed, direct = [], []
        all_of_it, alone = [self._servers.routed] * len(self._servers.single), self._servers.single
        for endpoints in (all_of_it, alone):
            self._decode(endpoints)  # the first use of a batch size makes its graph
        for _ in range(self._rounds):
            routed.append(rate_while_all_run(self._decode(all_of_it)))
            direct.append(rate_while_all_run(self._decode(alone)))
        return routed, direct

    def _decode(self, endpoints: Sequence[str]) -> list[Outcome]:
        effort, share = self._effort, self._effort.streams // PROCESSES_PER_DEVICE
        shares = [
            Share(endpoint, self._random(share, effort.prompt_tokens, effort.new_tokens), share)
            for endpoint in endpoints
            for _ in range(PROCESSES_PER_DEVICE)
        ]
        return self._processes.run(shares)

    def prefixes(self) -> dict[str, tuple[list[float], list[float]]]:
        """Return requests per second and shares of hits: of all copies, and of one single server."""
        servers = {"one server": (self._servers.single[0], 1)}
        servers[f"{len(self._servers.single)} copies"] = (self._servers.routed, len(self._servers.single))
        found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in servers}
        for _ in range(self._rounds):
            for name, (endpoint, devices) in servers.items():
                with Client(endpoint) as client:
                    before, rate = client.stats(), self._shared(endpoint, devices)
                    time.sleep(1.0)  # the router asks for counters twice a second
                    after = client.stats()
                asked = after["prompt_tokens"] - before["prompt_tokens"]
                found[name][0].append(rate)
                found[name][1].append((after["prefix_hit_tokens"] - before["prefix_hit_tokens"]) / asked)
        return found

    def _shared(self, endpoint: str, devices: int) -> float:
        effort, rng = self._effort, random.Random(self._next_seed())
        begins = [each.prompt_ids for each in self._random(PREFIXES, effort.prefix_tokens, 1)]
        ends = self._random(PREFIXES * effort.requests_per_prefix * devices, effort.own_tokens, 1)
        requests = [Request([*rng.choice(begins), *end.prompt_ids], effort.answer_tokens) for end in ends]
        parts = PROCESSES_PER_DEVICE * devices
        shares = [Share(endpoint, requests[at::parts], effort.streams // PROCESSES_PER_DEVICE) for at in range(parts)]
        return len(requests) / seconds_of(self._processes.run(shares))

    def _random(self, count: int, prompt_tokens: int, new_tokens: int) -> list[Request]:
        return random_requests(count, prompt_tokens, new_tokens, self._servers.vocab_size, self._next_seed())

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--kv-memory", default="30GiB", help="of each copy and each single server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true", help="with tiny models on CPU workers")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    box, shapes = find_box(options.rehearse, options.devices, 0), SMALL_SHAPES if options.rehearse else SHAPES
    with tempfile.TemporaryDirectory(prefix="mgpu-copies-") as folder, ExitStack() as stack:
        model = write_config(Path(folder) / "model", shapes[options.shape])
        words = ("--load-format", "dummy", "--kv-memory", "64MiB" if options.rehearse else options.kv_memory)
        words += ("--max-client-requests", "4096")
        all_devices, count = box.first(options.devices), options.devices
        together = stack.enter_context(serving(all_devices, model, *words, "--replicas", str(count)))
        alone = [stack.enter_context(serving(box.place([at]), model, *words)) for at in range(count)]
        routed, *single = (each.wait_ready(READY_S) for each in (together, *alone))
        servers = Servers(routed, single, read_checkpoint(model, "dummy").facts.vocab_size)
        processes = stack.enter_context(LoadProcesses(PROCESSES_PER_DEVICE * count))
        effort = REHEARSED if options.rehearse else REAL
        report = Report("copies", "mgpu", SHOWN, options.save, "torch", "pyzmq", model=options.shape, devices=count)
        measure(Comparison(servers, processes, effort, options.rounds), report, effort, count)


def measure(comparison: Comparison, report: Report, effort: Effort, count: int) -> None:
    """Measure both parts and add their rows."""

    def say(what: str, found: Sequence[float], unit: str, wanted: str = "") -> None:
        values = {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}
        report.add({"measured": what, **values, "unit": unit, "wanted": wanted})

    routed, direct = comparison.decoding()
    say(f"{count} copies, {effort.streams * count} streams", routed, "tokens/s")
    say(f"{count} single servers, {effort.streams} each", direct, "tokens/s")
    say("copies to single servers", [a / b for a, b in zip(routed, direct, strict=True)], "", "0.98")
    found = comparison.prefixes()
    for name, (rates, hits) in found.items():
        say(f"{PREFIXES} beginnings, {name}", rates, "requests/s")
        say(f"prompt tokens in a cache, {name}", hits, "")
    (single, _), (routed, _) = found.values()
    say("copies to one server", [a / b for a, b in zip(routed, single, strict=True)], "", "1.8")


if __name__ == "__main__":
    main()
