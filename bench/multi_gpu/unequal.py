"""Is the automatic layer map of an unequal box among the best? One GPU is slowed and filled, and maps are tried.

    python -m bench.multi_gpu.unequal                        # GPU 1 works for another process and has half its memory
    python -m bench.multi_gpu.unequal --counts 16,20,24,28   # layers of GPU 0 that are tried beside the automatic map
    python -m bench.multi_gpu.unequal --save FILE            # keep the rates
    python -m bench.multi_gpu.unequal --rehearse             # the same code with 2 CPU workers and a small model

The other process multiplies matrices without a pause, so that its GPU is never idle. Rates are those of many streams:
then the slowest stage bounds them. Each map is a server of its own.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.model_shapes import SHAPES, SMALL_SHAPES, write_config
from bench.multi_gpu.box import START_S, Box, find_box, plan_of, serving
from mgpu import Client
from mgpu.launch.bench.probe import Probe
from mgpu.launch.bench.report import Report
from mgpu.protocol.checkpoint.read import read_checkpoint

NO_NCCL = {"MGPU_NO_NCCL": "1"}
_SHOWN = "layers", "value", "value_low", "value_high"
_BUSY = """
import sys, torch
taken, device = int(sys.argv[1]), torch.device("cuda", int(sys.argv[2]))
held = torch.empty(taken, dtype=torch.uint8, device=device)
x = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
print("busy", flush=True)
while True:
    for _ in range(200):
        x @ x
    torch.cuda.synchronize()
"""


@contextmanager
def busy_gpu(device: int, taken_gib: float) -> Iterator[None]:
    """Keep a GPU working, and so much of its memory taken."""
    command = [sys.executable, "-c", _BUSY, str(int(taken_gib * 2**30)), str(device)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("busy"):
                raise RuntimeError("the process that keeps a GPU busy has ended")
            time.sleep(1.5)  # the driver counts use over the last second
            yield
        finally:
            process.kill()


def rates(box: Box, model: Path, options: tuple[str, ...], batch: int, repeat: int) -> list[float]:
    """Return the tokens per second of a layout, once for each repetition."""
    vocab = read_checkpoint(model, "dummy").facts.vocab_size
    server = serving(box.first(2), model, "--load-format", "dummy", "--max-seq-len", "4096", *options, environ=NO_NCCL)
    with server, Client(server.wait_ready(START_S), silence_timeout_s=60.0) as client:
        probe = Probe(client, vocab, seed=batch)
        probe.decode_rate(batch, 128, 0.0)
        return [probe.decode_rate(batch, 128, 0.7)[0] for _ in range(repeat)]


def automatic_counts(box: Box, model: Path) -> list[int]:
    """Return the layers of each stage that nobody asked for."""
    asked = ("-n", "0:4;1:4") if box.kind == "cpu" else ()  # CPU workers are split tensor-parallel by themselves
    layout = plan_of(box.first(2), "-m", str(model), "--max-seq-len", "4096", *asked, environ=NO_NCCL)
    print(f"reason: {layout['reason']}; notes: {layout['notes']}", flush=True)
    stages: list[dict[str, list[int]]] = layout["stages"]  # type: ignore[assignment]
    return [stage["layers"][1] - stage["layers"][0] for stage in stages]


def main() -> int:
    """Try maps and print their rates; 1 if the automatic one is more than 5 % slower than the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--counts", default="", help="layers of the first GPU, such as 16,20,24; default: a few around")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--taken-gib", type=float, default=70.0)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no other map is begun")
    arguments = parser.parse_args()
    began_s = time.monotonic()
    box = find_box(arguments.rehearse, 2, 0)
    shape = (SMALL_SHAPES if box.kind == "cpu" else SHAPES)["8B"]
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(Path(folder) / "model", shape)
        if box.kind == "cpu":
            return compare(box, model, arguments, began_s)
        with busy_gpu(1, arguments.taken_gib):
            return compare(box, model, arguments, began_s)


def compare(box: Box, model: Path, arguments: argparse.Namespace, began_s: float) -> int:
    """Measure the automatic map, then the others, then the automatic one again."""
    chosen = automatic_counts(box, model)
    layers = sum(chosen)
    report = Report("unequal", "mgpu", _SHOWN, arguments.save, "triton", batch=arguments.batch, automatic=chosen)
    others = [int(count) for count in arguments.counts.split(",") if count] or [
        count for step in (2, -2, 4, -4, 7, -7) if 0 < (count := chosen[0] + step) < layers
    ]
    found: dict[int, list[float]] = {}
    for count in (chosen[0], *others, chosen[0]):
        if count in found and count != chosen[0]:
            continue
        if time.monotonic() - began_s > arguments.budget:
            print(f"{count}: left out, no time", flush=True)
            continue
        options = ("-n", f"0:{count};1:{layers - count}")
        some = rates(box, model, options, arguments.batch, arguments.repeat)
        report.add({"layers": f"{count} and {layers - count}", "unit": "tok/s", "value": round(statistics.median(some)),
                    "value_low": round(min(some)), "value_high": round(max(some))})  # fmt: skip
        found.setdefault(count, []).extend(some)
    medians = {count: statistics.median(numbers) for count, numbers in found.items()}
    best = max(medians, key=medians.__getitem__)
    share = medians[chosen[0]] / medians[best]
    print(f"automatic {share:.1%} of the best, which is {best} and {layers - best} layers", flush=True)
    return int(share < 0.95)


if __name__ == "__main__":
    raise SystemExit(main())
