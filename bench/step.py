"""Break one worker's step down on a GPU, without a server: time per step, kernels, and what the GPU waits.

    python -m bench.step [--shape 8B] [--rows 1,8,64] [--quant fp8] [--format GPTQ] [--repeat 3] [--top 12]

Llama-3.1-8B or another shape with random weights in bfloat16, quantized, or in the format of a checkpoint. ``step``
is the time per decode step with two in flight, as the worker runs them; ``busy`` is the part of it in which some
kernel ran; ``launch`` is what the host does for one step. A step begins with the kernel that makes its inputs; ``idle
before a step`` is from the end of the kernel before. Rows of a random mixture of experts soon choose alike, so with
several rows it is faster here than with texts.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from bench.formats import FORMATS, facts_in
from bench.kernels.gpu_spans import Span, busy_us, idle_before_steps
from bench.options import numbers
from bench.performance.rows import BENCH, GAP, OCCUPANCY, SHOWN, STEP, TOKENS_PER_S
from bench.performance.rows import row as make_row
from mgpu.launch.bench.report import Report, Row, describe, heading
from mgpu.launch.bench.shapes import SHAPES
from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan
from mgpu.protocol.model.facts import KvCacheDtype, ModelFacts
from mgpu.protocol.model.placement import RankPlace
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.models.build import build_stage, init_dummy_weights
from mgpu.worker.ranks.collectives import MeasurableGroup, SingleRank
from mgpu.worker.ranks.links import Links
from mgpu.worker.state.kv_cache import KvCache, stored_dtype
from mgpu.worker.state.rows import RowTable
from mgpu.worker.steps.model_runner import ModelRunner

BLOCK, STEPS, MOST_ROWS = 64, 60, 256
PROFILED_STEPS = 12


def make_runner(
    facts: ModelFacts,
    context: int,
    quant: Quant,
    kept: KvCacheDtype,
    most_tokens: int | None = None,
    most_rows: int = MOST_ROWS,
) -> ModelRunner:
    """Make a worker's runner with random weights. ``most_tokens``: of the cache; left out: all rows at full length."""
    device, place, group = torch.device("cuda:0"), RankPlace(0, 0, 0, 1, 0), MeasurableGroup(SingleRank())
    layers = range(facts.num_layers)
    stage = build_stage(facts, place, layers, group, torch.bfloat16, device, quant, kv_cache_dtype=kept)
    stage.max_positions = longest = context + 4 * STEPS + BLOCK
    init_dummy_weights(stage, 0)
    blocks = most_rows * -(-(longest + 1) // BLOCK) if most_tokens is None else -(-most_tokens // BLOCK)
    sizes, types = (blocks, BLOCK, most_rows), (torch.bfloat16, stored_dtype(kept, torch.bfloat16))
    cache = KvCache.of_layers(facts, layers, place.part, sizes, types, device)
    rows = RowTable(most_rows, longest, BLOCK, blocks, device)
    links = Links(group)
    return ModelRunner(stage, cache, rows, links, facts, place, 1)


def fill(runner: ModelRunner, rows: int, context: int) -> float:
    """Compute a prompt for every row; return the milliseconds of the last one."""
    blocks = -(-(context + 4 * STEPS + BLOCK) // BLOCK)
    elapsed_s = 0.0
    for row in range(rows):
        ids = torch.randint(3, 1000, (context,), dtype=torch.int32).numpy().tobytes()
        new = NewRow(row, ids, context, [*range(row * blocks, (row + 1) * blocks)], RowSampling())
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        runner.run(StepPlan(0, 0, [row], [new], [], [], [row], [0], [context], [1]))
        torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - began_s
    return elapsed_s * 1e3


def decode(runner: ModelRunner, rows: int, start: int, steps: int) -> tuple[float, float]:
    """Return microseconds per step and of launching one."""
    numbers_of_rows, ones = [*range(rows)], [1] * rows
    launch_s = 0.0
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for step in range(steps):
        at_s = time.perf_counter()
        runner.run(StepPlan(0, 0, [], [], [], [], numbers_of_rows, [start + step] * rows, ones, ones))
        launch_s += time.perf_counter() - at_s if step < 3 else 0.0
    torch.cuda.synchronize()
    return (time.perf_counter() - began_s) * 1e6 / steps, launch_s * 1e6 / 3


def timed(runner: ModelRunner, rows: int, context: int, steps: int, repeat: int) -> tuple[list[float], float]:
    """Return the microseconds per step of ``repeat`` runs, least first, and of launching one in the median run."""
    decode(runner, rows, context, 10)
    runs = sorted(decode(runner, rows, context + 10, steps) for _ in range(repeat))
    return [step_us for step_us, _ in runs], runs[len(runs) // 2][1]


def rate_row(rows: int, context: int, form: str, steps_us: Sequence[float]) -> Row:
    """Make a row of the tokens per second of steps in a format."""
    return make_row(STEP, rows, context, TOKENS_PER_S, [rows / us * 1e6 for us in steps_us]) | {"format": form}


def record(what: Callable[[], object]) -> list[Span]:
    """Return the kernels and copies of the GPU during ``what``, in the order of their starts."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    with recording(activities=[ProfilerActivity.CUDA]) as found:
        what()
    events = [event for event in found.events() if event.device_type.name == "CUDA"]
    spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in events]
    return sorted(spans, key=lambda span: span.start_us)


def show(spans: Sequence[Span], times: int, top: int) -> float:
    """Print the kernels of ``times`` steps; return the share of the time in which something ran."""
    by_name = defaultdict(list)
    for span in spans:
        by_name[span.name].append(span.end_us - span.start_us)
    busy, whole = busy_us(spans), max(span.end_us for span in spans) - spans[0].start_us
    print(f"   busy {busy / times:.0f} us of {whole / times:.0f} per step (profiled)")
    for name, us in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"   {sum(us) / times:8.0f} us {len(us) // times:5} x {sum(us) / len(us):7.1f}  {name[:90]}")
    return busy / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--rows", type=numbers, default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--quant", choices=["none", "8", "4", "fp8"], default="none")
    parser.add_argument("--format", choices=FORMATS, default="", help="of a quantized checkpoint")
    parser.add_argument("--repeat", type=int, default=1, help="runs of so many steps; the median is shown")
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--kv-cache-dtype", choices=get_args(KvCacheDtype), default="auto")
    parser.add_argument("--save", type=Path, help="where rates and idle times go, as rows of bench/performance")
    arguments = parser.parse_args()
    print(heading(describe("triton")))
    facts = facts_in(SHAPES[arguments.shape], arguments.format)
    runner = make_runner(facts, arguments.context, arguments.quant, arguments.kv_cache_dtype)
    began_s = time.perf_counter()
    runner.warm_up(16, 0)
    torch.cuda.synchronize()
    print(f"warm-up {time.perf_counter() - began_s:.2f} s")
    form = arguments.format or arguments.quant
    report = Report(BENCH, "mgpu", SHOWN, arguments.save, "triton", shape=arguments.shape)
    for rows in arguments.rows:
        fill(runner, min(rows, 3), arguments.context)
        prompt_ms = fill(runner, rows, arguments.context)
        steps_us, launch_us = timed(runner, rows, arguments.context, STEPS, arguments.repeat)
        print(f"rows {rows}: last prompt {prompt_ms:.2f} ms, launching a step {launch_us:.0f} us")
        print(f"   step {statistics.median(steps_us):.0f} us")
        report.add(rate_row(rows, arguments.context, form, steps_us))
        if not arguments.top:
            continue
        spans = record(partial(decode, runner, rows, arguments.context + 80, PROFILED_STEPS))
        share = show(spans, PROFILED_STEPS, arguments.top)
        if idle := idle_before_steps(spans):
            print(f"   idle before a step: {statistics.median(idle):.1f} us, at most {max(idle):.1f}")
            report.add(make_row(GAP, rows, arguments.context, "us", idle))
        report.add(make_row(OCCUPANCY, rows, arguments.context, "share", [share]))
    if not arguments.top:
        return
    print("one prompt:")
    show(record(partial(fill, runner, 1, arguments.context)), 1, arguments.top)


if __name__ == "__main__":
    main()
