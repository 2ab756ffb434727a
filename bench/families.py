"""Measure the model families with linear or latent attention, or two kinds of heads, on one GPU and without a server.

    python -m bench.families SHAPE [--rows 1,64,256] [--contexts 1024,32768] [--prefill 4x8192] [--kv-cache-dtype fp8]

A worker's steps with random weights in bfloat16. Decoding is at 128 tokens of context, as a share of bytes-once: every
weight that a step needs, keys, values and states are read once (states are written too) at 4.3 TB/s. Of experts those
count that random routing chooses: with E experts, A of a token and B rows, E (1 - (1 - A / E)^B). ``--contexts``
compares 64 rows at several lengths. ``--prefill`` computes prompts one after the other, 8,192 tokens a step at most.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from bench.formats import facts_in
from bench.options import Sizes, numbers, sizes
from bench.performance.rows import DECODE, PREFILL, SHOWN, TOKENS_PER_S
from bench.performance.rows import row as make_row
from bench.step import BLOCK, MOST_ROWS, decode, make_runner, record, show
from mgpu.launch.bench.report import Report
from mgpu.launch.bench.shapes import SHAPES
from mgpu.orchestrator.placement.split.sizes import active_bytes
from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan
from mgpu.protocol.model.facts import KvCacheDtype, ModelFacts
from mgpu.worker.state.kv_cache import FP8
from mgpu.worker.steps.model_runner import ModelRunner

BYTES_PER_S = 4.3e12
"""At which an H200 reads."""
CONTEXT, MANY, STEP_TOKENS = 128, 64, 8192
STEPS, RUNS = 40, 5


def weight_bytes(facts: ModelFacts, rows: int) -> float:
    """Return the bytes of the weights of a step, without the embedding unless it is the head."""
    embedding = 0 if facts.tie_embeddings else facts.vocab_size * facts.hidden_size * 2
    total, _ = active_bytes(facts, 2, "none")
    if (experts := facts.experts) is None:
        return total - embedding
    chosen = experts.count * (1 - (1 - experts.active / experts.count) ** rows)
    idle = sum(experts.sparse_layers) * (experts.count - chosen)
    return total - embedding - idle * 3 * experts.width * facts.hidden_size * 2


def bytes_once(facts: ModelFacts, runner: ModelRunner, rows: int, context: int) -> tuple[float, float, float]:
    """Return the bytes of weights, of keys and values, and of states that a step moves."""
    layers = runner._cache.layers
    per_token = sum(
        layer.k_NBJK[0, 0].nbytes + (0 if layer.v_NBJK is layer.k_NBJK else layer.v_NBJK[0, 0].nbytes)
        for layer in layers
        if len(layer.k_NBJK)
    )
    windows = facts.sliding_window
    seen = [min(context, windows) if windows and slides else context for slides in facts.sliding_layers]
    share = statistics.fmean(seen) / context  # layers differ in bytes too, but only beyond the window does it count
    states = sum(
        layer.states.state_NHKV[0].nbytes + layer.states.tail_NWC[0].nbytes
        for layer in layers
        if layer.states is not None
    )
    return weight_bytes(facts, rows), rows * context * per_token * share, 2.0 * rows * states


def fill_caches(runner: ModelRunner) -> None:
    """Write small random numbers: contexts that were never computed must hold no NaN."""
    for layer in runner._cache.layers:
        for stored in (layer.k_NBJK, layer.v_NBJK):
            if stored.dtype == FP8:
                stored.view(torch.uint8).random_(0, 0x30)  # the bits of numbers from 0 to 0.5
            else:
                stored.normal_(0.0, 0.5)
        if layer.states is not None:
            layer.states.state_NHKV.normal_(0.0, 0.1)
            layer.states.tail_NWC.normal_(0.0, 0.5)


def new_rows(rows: int, length: int) -> list[NewRow]:
    """Return rows with random prompts and room for what they decode; nothing computes the prompts by itself."""
    blocks = -(-(length + 6 * STEPS) // BLOCK)
    ids = [torch.randint(3, 1000, (length,), dtype=torch.int32).numpy().tobytes() for _ in range(rows)]
    return [NewRow(r, ids[r], length, [*range(r * blocks, (r + 1) * blocks)], RowSampling()) for r in range(rows)]


def free(runner: ModelRunner) -> None:
    runner.run(StepPlan(0, 0, [*range(MOST_ROWS)], [], [], [], [], [], [], []))


def decode_us(runner: ModelRunner, rows: int, context: int, runs: int = RUNS) -> list[float]:
    """Return the microseconds per step of several runs."""
    decode(runner, rows, context + 2, 10)
    return [decode(runner, rows, context + 16, STEPS)[0] for _ in range(runs)]


def measure_decoding(runner: ModelRunner, facts: ModelFacts, rows: int, report: Report, top: int) -> None:
    free(runner)
    runner.run(StepPlan(0, 0, [], new_rows(rows, CONTEXT), [], [], [], [], [], []))
    us = decode_us(runner, rows, CONTEXT)
    weights, kv, states = bytes_once(facts, runner, rows, CONTEXT + STEPS // 2)
    most = rows * BYTES_PER_S / (weights + kv + states)
    rates = [rows / each * 1e6 for each in us]
    row = make_row(DECODE, rows, CONTEXT, TOKENS_PER_S, rates)
    report.add(row | {"limit": most, "share": statistics.median(rates) / most})
    print(
        f"   step {statistics.median(us):,.0f} us ({min(us):,.0f} to {max(us):,.0f}); weights {weights / 1e9:.2f} GB, "
        f"keys and values {kv / 1e9:.2f}, states {states / 1e9:.2f}: {rows / most * 1e6:,.0f} us at 4.3 TB/s"
    )
    if top:
        show(record(partial(decode, runner, rows, CONTEXT + 80, 12)), 12, top)


def measure_contexts(runner: ModelRunner, contexts: Sequence[int], report: Report) -> None:
    free(runner)
    runner.run(StepPlan(0, 0, [], new_rows(MANY, max(contexts)), [], [], [], [], [], []))
    medians = []
    for context in contexts:
        us = decode_us(runner, MANY, context - STEPS, 3)
        medians.append(statistics.median(us))
        report.add(make_row("decode step", MANY, context, "us", us))
    ratios = ", ".join(f"{each / medians[0]:.2f}" for each in medians)
    print(f"   steps of {MANY} rows at {', '.join(f'{each:,}' for each in contexts)} tokens, to the first: {ratios}")


def prefill_s(runner: ModelRunner, count: int, length: int) -> float:
    """Return the seconds of some prompts, one after the other."""
    free(runner)
    rows = new_rows(count, length)
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for row in range(count):
        for start in range(0, length, STEP_TOKENS):
            tokens = min(STEP_TOKENS, length - start)
            new = [rows[row]] if start == 0 else []
            plan = StepPlan(0, 0, [], new, [], [], [row], [start], [tokens], [int(start + tokens == length)])
            runner.run(plan)
    torch.cuda.synchronize()
    return time.perf_counter() - began_s


def measure_prefill(runner: ModelRunner, count: int, length: int, report: Report, top: int) -> None:
    prefill_s(runner, 1, length)
    seconds = [prefill_s(runner, count, length) for _ in range(3)]
    report.add(make_row(PREFILL, count, length, TOKENS_PER_S, [count * length / each for each in seconds]))
    if top:
        show(record(partial(prefill_s, runner, 1, length)), 1, top)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rows", type=numbers, default=[])
    parser.add_argument("--contexts", type=numbers, default=[])
    parser.add_argument("--prefill", type=sizes, default=())
    parser.add_argument("--kv-cache-dtype", choices=get_args(KvCacheDtype), default="auto")
    parser.add_argument("--top", type=int, default=0, help="kernels to show of each profile")
    parser.add_argument("--layers", type=int, help="only so many layers: to compile kernels ahead, or to rehearse")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    prefill: Sizes = arguments.prefill
    config = dict(SHAPES[arguments.shape])
    if arguments.layers:
        config |= {"num_hidden_layers": arguments.layers}
        config |= {"layer_types": config["layer_types"][: arguments.layers]} if "layer_types" in config else {}  # type: ignore[index]
    longest = max([CONTEXT, *arguments.contexts, *(length for _, length in prefill)])
    room = 7 * STEPS + BLOCK
    needed = [
        max(arguments.rows, default=1) * (CONTEXT + room),
        *(MANY * (context + room) for context in arguments.contexts),
        *(count * (length + room) for count, length in prefill),
    ]
    runner = make_runner(facts_in(config), longest, "none", arguments.kv_cache_dtype, max(needed))
    facts = replace(runner._stage.facts)
    fill_caches(runner)
    report = Report("families", "mgpu", SHOWN, arguments.save, "triton", shape=arguments.shape)
    if arguments.rows or arguments.contexts:
        runner.warm_up(16, 0)
    for rows in arguments.rows:
        measure_decoding(runner, facts, rows, report, arguments.top if rows == arguments.rows[0] else 0)
    if arguments.contexts:
        measure_contexts(runner, arguments.contexts, report)
    for count, length in prefill:
        measure_prefill(runner, count, length, report, arguments.top if length == prefill[-1][1] else 0)


if __name__ == "__main__":
    main()
