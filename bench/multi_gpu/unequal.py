"""Is the automatic layer map of an unequal box among the best? One GPU is slowed and filled, and maps are tried.

    python -m bench.multi_gpu.unequal                        # GPU 1 works for another process and has half its memory
    python -m bench.multi_gpu.unequal --counts 16,20,24,28   # layers of GPU 0 that are tried beside the automatic map
    python -m bench.multi_gpu.unequal --save FILE            # keep the rates
    python -m bench.multi_gpu.unequal --rehearse             # the same code with 2 CPU workers and a small model

The other process multiplies matrices without a pause, so that its GPU is never idle. Rates are those of many streams:
then the slowest stage bounds them. The map is chosen as a server would; all of them are measured in the same processes.
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
from bench.multi_gpu.box import Box, find_box, plan_of
from bench.multi_gpu.map_rates import rates_of_maps
from mgpu.launch.bench.report import Report

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
    parser.add_argument("--counts", default="", help="layers of the first GPU, such as 16,20,24; default: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--taken-gib", type=float, default=70.0)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    box = find_box(arguments.rehearse, 2, 0)
    shape = (SMALL_SHAPES if box.kind == "cpu" else SHAPES)["8B"]
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(Path(folder) / "model", shape)
        if box.kind == "cpu":
            return compare(box, model, arguments)
        with busy_gpu(1, arguments.taken_gib):
            return compare(box, model, arguments)


def compare(box: Box, model: Path, arguments: argparse.Namespace) -> int:
    """Measure the automatic map, then the others."""
    chosen = automatic_counts(box, model)
    layers = sum(chosen)
    report = Report("unequal", "mgpu", _SHOWN, arguments.save, "triton", batch=arguments.batch, automatic=chosen)
    others = [int(count) for count in arguments.counts.split(",") if count] or [*range(1, layers)]
    counts = [chosen[0], *(count for count in others if count != chosen[0])]
    medians: dict[int, float] = {}
    for count, some in rates_of_maps(arguments, layers, counts):
        medians[count] = statistics.median(some)
        report.add({"layers": f"{count} and {layers - count}", "unit": "tok/s", "value": round(statistics.median(some)),
                    "value_low": round(min(some)), "value_high": round(max(some))})  # fmt: skip
    best = max(medians, key=medians.__getitem__)
    share = medians[chosen[0]] / medians[best]
    print(f"automatic {share:.1%} of the best, which is {best} and {layers - best} layers", flush=True)
    return int(share < 0.95)


if __name__ == "__main__":
    raise SystemExit(main())
