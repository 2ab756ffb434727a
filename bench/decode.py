"""Measure a server through its front channel: decoding by batch, prefill, time to first token, time to ready.

    python bench/decode.py [--batches 1,8,64,256] [--contexts 128,1024] [--model FOLDER] [-- SERVE OPTIONS]

Without ``--model``: Llama-3.1-8B in bfloat16 with random weights made in place. Every number is a median of
``--repeat`` runs. Decoding is counted for ``--seconds`` from the moment when all requests of the batch have their first
token, and none ends meanwhile. ``context`` is the prompt; the limit of a step is every byte once, weights without the
input embedding plus the keys and values of the contexts as they are in the middle of the count, over ``--tbps``.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, heading
from model_shapes import LLAMA_8B, write_config

from mgpu import Client
from mgpu.launch.bench.probe import Probe as Bench
from mgpu.launch.server_process import ServerProcess
from mgpu.protocol.checkpoint import read_checkpoint
from mgpu.protocol.model import DTYPE_BYTES, ModelFacts


@dataclass(frozen=True, slots=True)
class Decode:
    batch: int
    context: int
    tokens_per_s: float
    limit: float

    def line(self) -> str:
        share = self.tokens_per_s / self.limit
        return f"{self.batch:5} {self.context:8} {self.tokens_per_s:10.0f} {self.limit:10.0f} {share:7.1%}"


@dataclass(frozen=True, slots=True)
class Timing:
    what: str
    value: float
    unit: str

    def line(self) -> str:
        return f"{self.what:<40} {self.value:10.1f} {self.unit}"


def step_bytes(facts: ModelFacts, batch: int, context: float, itemsize: int) -> float:
    """Give what a decode step must read: all weights but the input embedding, and the contexts' keys and values."""
    width = (facts.num_q_heads + 2 * facts.num_kv_heads) * facts.head_dim
    layer = facts.hidden_size * (width + facts.num_q_heads * facts.head_dim + 3 * facts.intermediate_size)
    weights = facts.num_layers * layer + facts.vocab_size * facts.hidden_size
    cache = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * batch * context
    return float(itemsize * (weights + cache))


def measure_decode(bench: Bench, facts: ModelFacts, itemsize: int, arguments: argparse.Namespace) -> list[Decode]:
    results = []
    print(f"{'batch':>5} {'context':>8} {'tok/s':>10} {'limit':>10} {'share':>7}", flush=True)
    for context in arguments.contexts:
        for batch in arguments.batches:
            bench.decode_rate(batch, context, 0.0)  # the first use of a batch size makes its graph
            runs = [bench.decode_rate(batch, context, arguments.seconds) for _ in range(arguments.repeat)]
            rate, middle = (statistics.median(values) for values in zip(*runs, strict=True))
            limit = batch * arguments.tbps * 1e12 / step_bytes(facts, batch, middle, itemsize)
            results.append(Decode(batch, context, rate, limit))
            print(results[-1].line(), flush=True)
    return results


def measure_rest(bench: Bench, arguments: argparse.Namespace) -> list[Timing]:
    """Prefill and time to first token."""
    results = []

    def note(what: str, value: float, unit: str) -> None:
        results.append(Timing(what, value, unit))
        print(results[-1].line(), flush=True)

    times = [bench.first_token_ms(128) for _ in range(5 * arguments.repeat)][arguments.repeat :]
    note("time to first token, 128 tokens", statistics.median(times), "ms")
    note("slowest of them", max(times), "ms")
    for count, length in arguments.prefill:
        rates = [bench.prefill_rate(count, length) for _ in range(arguments.repeat)]
        note(f"prefill {count} x {length}", statistics.median(rates), "tok/s")
    for count, length, new_tokens in arguments.closed:
        rates = [bench.closed_loop(count, length, new_tokens) for _ in range(min(3, arguments.repeat))]
        note(f"{count} requests of {length} in, {new_tokens} out", statistics.median(rates), "out tok/s")
    return results


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, part.split("x"))) for part in text.split(",") if part]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; only its config.json is read unless --weights is given")
    parser.add_argument("--weights", action="store_true", help="read the model's weights")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 64, 256])
    parser.add_argument("--contexts", type=numbers, default=[128, 1024])
    parser.add_argument("--prefill", type=shapes, default=[(32, 1024), (4, 8192)])
    parser.add_argument("--closed", type=shapes, default=[(256, 1024, 256)])
    parser.add_argument("--seconds", type=float, default=1.5, help="how long decoding is counted")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tbps", type=float, default=4.3, help="read bandwidth that shares are shares of")
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="options of mgpu-launch serve, after --")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    facts_of_machine = describe("triton", "pyzmq")
    print(heading(facts_of_machine))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            write_config(Path(folder), LLAMA_8B)
        model = arguments.model or folder
        load = [] if arguments.weights else ["--load-format", "dummy"]
        facts = read_checkpoint(model, "dummy").facts
        began_s = time.perf_counter()
        with ServerProcess("-m", model, *load, *arguments.options) as server:
            endpoint = server.wait_ready()
            ready = Timing("ready after", time.perf_counter() - began_s, "s")
            print(server.output(), ready.line(), sep="\n", flush=True)
            with Client(endpoint, silence_timeout_s=60.0) as client:
                bench = Bench(client, facts.vocab_size)
                decode = measure_decode(bench, facts, DTYPE_BYTES[facts.checkpoint_dtype], arguments)
                timings = [ready, *measure_rest(bench, arguments)]
                stats = client.stats()
    print(json.dumps(stats))
    if arguments.json:
        report = {
            "machine": facts_of_machine,
            "decode": list(map(asdict, decode)),
            "timings": list(map(asdict, timings)),
            "stats": stats,
        }
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
