"""Compare decode steps of a model in several formats with bfloat16, at many numbers of rows, on one GPU.

    python -m bench.quantized [--shape 8B] [--formats 4,8,fp8,GPTQ] [--rows 1,2,4,…,512] [--save FILE]

Formats are those of ``--quant`` and of ``bench.step --format``. Weights are random, and there is no server: a worker's
steps with two in flight, as `bench.step` times them. A row gives tokens per second (median, least and greatest of the
runs); ``share`` is the rate in bfloat16 at the same number of rows as 100 %, so below that a quantized model is slower.
"""

import argparse
import gc
import statistics
from pathlib import Path

import torch

from bench.formats import FORMATS, facts_in
from bench.options import numbers, words
from bench.performance.rows import BENCH, SHOWN
from bench.step import fill, make_runner, rate_row, timed
from mgpu.launch.bench.report import Report
from mgpu.launch.bench.shapes import SHAPES
from mgpu.protocol.model.quantization import Quant

QUANTS: dict[str, Quant] = {"none": "none", "8": "8", "4": "4", "fp8": "fp8"}
BFLOAT16 = "none"
STEPS = 20


def measure(shape: str, form: str, counts: list[int], context: int, repeat: int) -> dict[int, list[float]]:
    """Return the microseconds per step at each number of rows, least first."""
    facts = facts_in(SHAPES[shape], form if form in FORMATS else "")
    runner = make_runner(facts, context, QUANTS.get(form, "none"), "auto", most_rows=max(counts))
    runner.warm_up(16, 0)
    fill(runner, max(counts), context)
    return {rows: timed(runner, rows, context, STEPS, repeat)[0] for rows in counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--formats", type=words, default=["4", "8", "fp8", "GPTQ", "AWQ", "FP8-blocks", "Q4_K"])
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--save", type=Path, help="where rates go, as rows of bench/performance")
    options = parser.parse_args()
    if unknown := set(options.formats) - set(QUANTS) - set(FORMATS):
        parser.error(f"unknown formats: {', '.join(sorted(unknown))}; known are {', '.join((*QUANTS, *FORMATS[1:]))}")
    report = Report(BENCH, "mgpu", ("format", *SHOWN), options.save, "triton", shape=options.shape)
    bfloat16_us: dict[int, float] = {}
    for form in dict.fromkeys((BFLOAT16, *options.formats)):
        for rows, steps_us in measure(options.shape, form, options.rows, options.context, options.repeat).items():
            bfloat16_us.setdefault(rows, statistics.median(steps_us))
            share = bfloat16_us[rows] / statistics.median(steps_us)
            report.add(rate_row(rows, options.context, form, steps_us) | {"share": share})
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
