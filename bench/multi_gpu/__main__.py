"""Check and measure mgpu on several GPUs: correctness, all-reduce, speed, faults. One table, saved after every row.

    python -m bench.multi_gpu                            # everything, on all visible GPUs
    python -m bench.multi_gpu --only speed --models 70B --sizes 4,8 --budget 540
    python -m bench.multi_gpu --rehearse                 # the same code on CPU workers with small models
    python -m bench.multi_gpu --share 2                  # two workers on one GPU

docs/multi-gpu.md says what the rows mean. The status is 1 when a row is FAIL or missed.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.model_shapes import SHAPES
from bench.multi_gpu import all_reduce as multi_gpu_all_reduce
from bench.multi_gpu import faults as multi_gpu_faults
from bench.multi_gpu import tokens as multi_gpu_tokens
from bench.multi_gpu.box import Box, find_box
from bench.multi_gpu.report import Report
from bench.multi_gpu.speed import Speed
from bench.options import numbers, words
from mgpu.launch.bench.report import describe, heading
from mgpu.orchestrator.errors import DeviceError

SECTIONS = ("all-reduce", "tokens", "speed", "faults")
RESULTS = Path(__file__).parents[1] / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=words, default=list(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--sizes", type=numbers, help="tensor-parallel sizes to measure (default: 1,2,4,8)")
    parser.add_argument("--models", type=words, help=f"shapes to measure (default: {','.join(SHAPES)})")
    parser.add_argument(
        "--page-cache", type=words, default=[], metavar="MODELS", help="write these shapes' weights, time their start"
    )
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which nothing new is begun")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="servers side by side where tokens count")
    parser.add_argument("--cases", default="", metavar="REGEX", help="compare tokens of these layouts only")
    parser.add_argument("--rehearse", action="store_true", help="CPU workers and small models; no verdicts on speed")
    parser.add_argument("--devices", type=int, default=4, help="how many CPU workers to rehearse with")
    parser.add_argument("--share", type=int, default=0, metavar="N", help="N workers that share the GPUs")
    parser.add_argument("--json", type=Path, help="where to save the rows (default: in bench/results)")
    arguments = parser.parse_args()
    # A rehearsal takes each path once: there is only one small shape's worth of time.
    arguments.sizes = arguments.sizes or ([1, arguments.devices] if arguments.rehearse else [1, 2, 4, 8])
    arguments.models = arguments.models or (["8B"] if arguments.rehearse else list(SHAPES))
    if unknown := set(arguments.only) - set(SECTIONS):
        parser.error(f"--only {', '.join(sorted(unknown))}: the sections are {', '.join(SECTIONS)}")
    if unknown := (set(arguments.models) | set(arguments.page_cache)) - set(SHAPES):
        parser.error(f"--models {', '.join(sorted(unknown))}: the shapes are {', '.join(SHAPES)}")
    if arguments.rehearse:
        arguments.page_cache = arguments.models
    return arguments


def sections(box: Box, report: Report, folder: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    def speed() -> None:
        measured = Speed(box, report, folder / "speed", arguments.models, arguments.sizes)
        measured.run()
        measured.ready_from_page_cache(arguments.page_cache)

    return {
        "all-reduce": lambda: multi_gpu_all_reduce.run(box, report),
        "tokens": lambda: multi_gpu_tokens.run(box, report, folder / "tokens", arguments.at_once, arguments.cases),
        "speed": speed,
        "faults": lambda: multi_gpu_faults.run(box, report, folder / "faults"),
    }


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers end with the blocks they are in
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # without NVLink multicast, which not every host can give
    try:
        box = find_box(arguments.rehearse, arguments.devices, arguments.share)
    except DeviceError as error:
        sys.exit(f"{error}; --rehearse runs the same code on CPU workers")
    path = arguments.json or RESULTS / f"multi_gpu_{box.kind}_{box.size}.json"
    report = Report(
        describe("triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13"), path, box.kind != "gpus", arguments.budget
    )
    print(heading(report.machine), report.heading(), sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="mgpu-bench-") as folder:
        for name, run in sections(box, report, Path(folder), arguments).items():
            if name in arguments.only:
                with report.guard(name, "the section"):
                    run()
    print(f"{report.summary()}; saved as {path}")
    sys.exit(0 if report.is_good else 1)


if __name__ == "__main__":
    main()
