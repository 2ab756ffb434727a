"""Break the laps of several stages down on GPUs, without a server: time per lap, and what each GPU does and waits for.

    python -m bench.multi_gpu.laps [--shape 8B] [--map 17,15] [--rows 1,64,256] [--context 128] [--top 8] [--tp]
    python -m bench.multi_gpu.laps --tp --step-tokens 8192 --prefill --save FILE

One process per rank runs the steps that the orchestrator would plan: lanes take turns, and a step is launched when all
steps more than one lap before it are done. ``--tp`` makes one stage of two ranks instead. Random weights. Rates go to
the file of ``--save`` too, one row for each number of rows.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from bench.kernels.gpu_spans import Span, busy_us
from bench.model_shapes import SMALL_SHAPES
from bench.options import numbers
from bench.performance.rows import DECODE, PREFILL, TOKENS_PER_S
from bench.performance.rows import row as make_row
from bench.step import record
from mgpu.launch.bench.report import Row, describe, save_json
from mgpu.launch.bench.shapes import SHAPES, write_config
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan, WorkerSpec
from mgpu.protocol.model.kv_pools import PoolSize
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import PlacementPlan, Stage
from mgpu.worker.ranks.links import connect, layout_of
from mgpu.worker.ranks.relay import Relay
from mgpu.worker.ranks.relay_check import _pass_on, _return_tokens
from mgpu.worker.start.compile_ahead.compile_ahead import CompileAhead, start_triton
from mgpu.worker.start.startup import StartUp
from mgpu.worker.steps.model_runner import ModelRunner

CONFIGS = {**SHAPES, "small": SMALL_SHAPES["8B"]}
BLOCK, MOST_ROWS = 64, 256
PROMPTS, PROMPT = 16, 2048
REPEAT, PROFILED_LAPS = 3, 6
WAITING = ("_receive_kernel", "_fetch_kernel", "_one_shot_kernel", "_two_shot_kernel", "_exchange_kernel", "nccl")
HANG_S = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What every rank is told."""

    spec: WorkerSpec
    rows: list[int]
    context: int
    top: int
    laps: int
    stress: int
    prefill: bool


def make_spec(arguments: argparse.Namespace, fd: int) -> WorkerSpec:
    shape, layers, is_tp, transport = arguments.shape, arguments.map, arguments.tp, arguments.transport
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = read_checkpoint(write_config(Path(folder), CONFIGS[shape]), "dummy")
    num_layers = checkpoint.facts.num_layers
    if is_tp:
        stages = [Stage(0, num_layers, (0, 1))]
    else:
        counts = layers or [num_layers - num_layers // 2, num_layers // 2]
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        stages = [
            Stage(end - count, end, (index,)) for index, (count, end) in enumerate(zip(counts, ends, strict=True))
        ]
    on_gpu = arguments.device == "cuda"
    between = ("peer" if on_gpu else "shared-memory") if transport == "kernels" else transport
    inside = ("nccl" if on_gpu else "shared-memory") if is_tp else ("nccl" if transport == "nccl" else "none")
    spec = WorkerSpec(
        epoch=0,
        model=replace(checkpoint.source, load_format="dummy"),
        facts=checkpoint.facts,
        layout=Layout(
            PlacementPlan(tuple(stages)),
            "bfloat16" if on_gpu else "float32",
            inside,  # type: ignore[arg-type]
            between,  # type: ignore[arg-type]
            quant=arguments.quant,
        ),
        limits=StepLimits(BLOCK, MOST_ROWS, arguments.step_tokens, 4096),
        device=arguments.device,
        endpoint="",
        rendezvous=f"file://{tempfile.mkdtemp()}/group",
        shared_fd=fd,
        shared_bytes=0,
        num_threads=1,
        memory_fraction=0.9,
        kv_memory=0,
        seed=0,
        worker_timeout_s=40.0,
    )
    return replace(spec, shared_bytes=layout_of(spec).total_bytes)


class Rank:
    """One rank's runner, and the pace that all ranks keep."""

    def __init__(self, settings: Settings, rank: int, done: "Synchronized[int]") -> None:
        spec = settings.spec
        self.place = spec.layout.placement.place_of(rank)
        self.device = torch.device("cuda", self.place.device) if spec.device == "cuda" else torch.device("cpu")
        start_triton(self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.links = connect(spec, rank, self.device)
        if rank == 0:
            print("   ", "; ".join(self.links.notes), flush=True)
        self.row_blocks = -(-(settings.context + 2 * settings.laps * REPEAT + BLOCK) // BLOCK)
        self.runner = self.load(spec, MOST_ROWS)
        self.stages = spec.layout.placement.num_stages
        self.reports = rank == spec.layout.placement.output_rank
        self.done, self.step = done, 0
        self.step_tokens = spec.limits.max_batch_tokens
        self.launched: list[int] = []
        self.events: deque[tuple[int, torch.cuda.Event | None]] = deque()

    def load(self, spec: WorkerSpec, rows: int, is_compiled: bool = False) -> ModelRunner:
        """Return the runner of a spec that has the same ranks and stages as the first one."""
        place = spec.layout.placement.place_of(self.place.rank)
        start_up = StartUp(spec, place, self.device, self.links)
        with nullcontext() if is_compiled else CompileAhead(spec, place, self.device).running():
            stage, _ = start_up.load(lambda done, total: None)
        stage.choose_attention()
        return start_up.allocate(stage, PoolSize(rows * self.row_blocks))

    def run(self, plan: StepPlan, gap: int = 1) -> None:
        """Run a step when all steps more than a lap before it are done; the next one is ``gap`` steps later."""
        began_s = time.monotonic()
        self._collect(plan.step - self.stages - 1)
        while self.done.value < self.last_before(plan.step):
            os.sched_yield()
            if time.monotonic() - began_s > HANG_S:
                raise TimeoutError(f"step {plan.step}: the last stage has done step {self.done.value}")
        self.runner.run(plan)
        self.launched.append(plan.step)
        if self.reports:
            event = None
            if self.device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            self.events.append((plan.step, event))
        self.step = plan.step + gap
        self._collect(self.step - self.stages - 1)

    def last_before(self, step: int) -> int:
        """Return the last step that must be done before this one is launched."""
        for earlier in reversed(self.launched):
            if earlier < step - self.stages:
                return earlier
        return -1

    def _collect(self, until: int) -> None:
        while self.events and self.events[0][0] <= until:
            step, event = self.events.popleft()
            if event is not None:
                event.synchronize()
            self.done.value = step

    def finish(self) -> None:
        """Wait until everything is done."""
        self._collect(1 << 60)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.runner.check_peers()
        while self.launched and self.done.value < self.launched[-1]:
            os.sched_yield()

    def fill(self, batch: int, context: int) -> None:
        """Compute the prompts of a batch, in steps of as many tokens as there may be."""
        together = max(1, self.step_tokens // context)
        for first in range(0, batch, together):
            rows = [*range(first, min(batch, first + together))]
            new = []
            for row in rows:
                ids = torch.randint(3, 1000, (context,), dtype=torch.int32).numpy().tobytes()
                blocks = [*range(row * self.row_blocks, (row + 1) * self.row_blocks)]
                new.append(NewRow(row, ids, context, blocks, RowSampling()))
            ones, zeros = [1] * len(rows), [0] * len(rows)
            self.run(StepPlan(0, self.step, rows, new, [], [], rows, zeros, [context] * len(rows), ones), self.stages)
        self.finish()

    def decode(self, batch: int, start: int, laps: int) -> float:
        """Return microseconds per lap, in which every row gets a token."""
        lanes = [[*range(lane, batch, self.stages)] for lane in range(self.stages)]
        self.step = -(-self.step // self.stages) * self.stages + self.stages
        torch.cuda.synchronize() if self.device.type == "cuda" else None
        began_s = time.perf_counter()
        for lap in range(laps):
            for lane in lanes:
                if lane:
                    ones, at = [1] * len(lane), [start + lap] * len(lane)
                    self.run(StepPlan(0, self.step, [], [], [], [], lane, at, ones, ones))
                else:
                    self.step += 1
        self.finish()
        return (time.perf_counter() - began_s) * 1e6 / laps

    def prefill(self) -> float:
        """Return tokens per second of prompts that come at once."""
        blocks, together = PROMPT // BLOCK + 1, max(1, self.step_tokens // PROMPT)
        began_s = time.perf_counter()
        for first in range(0, PROMPTS, together):
            rows = [*range(first, min(first + together, PROMPTS))]
            new = []
            for row in rows:
                ids = torch.randint(3, 1000, (PROMPT,), dtype=torch.int32).numpy().tobytes()
                new.append(NewRow(row, ids, PROMPT, [*range(row * blocks, (row + 1) * blocks)], RowSampling()))
            zeros, ones = [0] * len(rows), [1] * len(rows)
            self.run(StepPlan(0, self.step, rows, new, [], [], rows, zeros, [PROMPT] * len(rows), ones))
        self.finish()
        return PROMPTS * PROMPT / (time.perf_counter() - began_s)


def show(spans: Sequence[Span], laps: int, top: int, name: str) -> str:
    """Say what a GPU did in ``laps`` laps; kernels that wait for other GPUs are counted apart."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        by_name[span.name].append(span.end_us - span.start_us)
    busy, whole = busy_us(spans), max(span.end_us for span in spans) - spans[0].start_us
    waits = busy_us([span for span in spans if any(each in span.name for each in WAITING)])
    lines = [f"    {name}: of {whole / laps:.0f} us per lap busy {busy / laps:.0f}, waiting kernels {waits / laps:.0f}"]
    for kernel, us in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]:
        middle = statistics.median(us)
        lines.append(
            f"      {sum(us) / laps:8.0f} us {len(us) / laps:6.1f} x {middle:7.1f} (to {max(us):.0f})  {kernel[:80]}"
        )
    return "\n".join(lines)


def stress(relay: Relay, rounds: int, device: torch.device) -> str:
    """Pass rows and tokens on many times; return what is wrong."""
    for turn in range(rounds):
        for rows in (1, 5, 64, 527, 528, 529, relay.most_rows):
            rows = min(rows, relay.most_rows)
            if problem := _pass_on(relay, turn, rows, device) or _return_tokens(relay, turn, rows, device):
                return f"round {turn}: {problem}"
    return ""


@torch.inference_mode()
def run_rank(
    settings: Settings,
    rank: int,
    parent_fd: str,
    done: "Synchronized[int]",
    found: "Queue[tuple[list[Row], list[str]]]",
) -> None:
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    fd = os.open(parent_fd, os.O_RDWR)
    began_s = time.perf_counter()
    each = Rank(replace(settings, spec=replace(settings.spec, shared_fd=fd)), rank, done)
    say = partial(print, flush=True) if rank == 0 else (lambda *_: None)
    if settings.stress and each.links.relay is not None:
        problem = stress(each.links.relay, settings.stress, each.device)
        say(f"    {settings.stress} rounds of a relay: {problem or 'right'}")
    say(f"    loaded after {time.perf_counter() - began_s:.1f} s, graphs: {each.runner._graphs is not None}")
    each.runner.warm_up(16, 0)
    say(f"    warm after {time.perf_counter() - began_s:.1f} s")
    rows: list[Row] = []
    for batch in settings.rows:
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        each.fill(batch, settings.context)
        each.decode(batch, settings.context, 10)
        times = [
            each.decode(batch, settings.context + 10 + settings.laps * turn, settings.laps) for turn in range(REPEAT)
        ]
        rates = sorted(batch / us * 1e6 for us in times)
        spread = f"{rates[0]:.0f} to {rates[-1]:.0f}"
        say(f"    batch {batch}: {rates[1]:.0f} tok/s ({spread}), lap {sorted(times)[1]:.0f} us")
        rows.append(make_row(DECODE, batch, settings.context, TOKENS_PER_S, rates))
        if each.device.type == "cuda" and settings.top:
            start = settings.context + 20 + settings.laps * REPEAT
            spans = record(partial(each.decode, batch, start, PROFILED_LAPS))
            print(show(spans, PROFILED_LAPS, settings.top, f"rank {rank}"), flush=True)
    if settings.prefill:
        each.prefill()
        rates = sorted(each.prefill() for _ in range(REPEAT))
        say(f"    prefill {PROMPTS} x {PROMPT}: {rates[1]:.0f} tok/s ({rates[0]:.0f} to {rates[-1]:.0f})")
        rows.append(make_row(PREFILL, PROMPTS, PROMPT, TOKENS_PER_S, rates))
        if each.device.type == "cuda" and settings.top:
            print(show(record(each.prefill), PROMPTS, settings.top, f"rank {rank}, by prompt"), flush=True)
    if rank == 0:
        found.put((rows, each.links.notes))
    faulthandler.cancel_dump_traceback_later()
    each.links.close()


def save(arguments: argparse.Namespace, rows: list[Row], notes: list[str]) -> None:
    """Add the rows of this run to the file of ``--save``, if there is one, beside what was asked and how sums went."""
    if arguments.save is None:
        return
    before = json.loads(arguments.save.read_text()) if arguments.save.exists() else {"bench": "laps", "runs": []}
    switches = {name: value for name, value in os.environ.items() if name.startswith("MGPU_")}
    asked = {name: getattr(arguments, name) for name in ("shape", "map", "tp", "transport", "quant", "step_tokens")}
    before["machine"] = describe("triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
    before["runs"].append({**asked, "environ": switches, "notes": notes, "rows": rows})
    save_json(arguments.save, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=CONFIGS, default="8B")
    parser.add_argument("--map", type=numbers, default=[], help="layers of each stage (default: two halves)")
    parser.add_argument("--tp", action="store_true", help="one stage of two ranks")
    parser.add_argument("--transport", choices=("kernels", "nccl"), default="kernels")
    parser.add_argument("--rows", type=numbers, default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--top", type=int, default=8, help="kernels to show of each rank; 0: no profile")
    parser.add_argument("--laps", type=int, default=100)
    parser.add_argument("--stress", type=int, default=0, help="rounds of checked messages before all else")
    parser.add_argument("--prefill", action="store_true", help=f"measure {PROMPTS} prompts of {PROMPT} tokens, too")
    parser.add_argument("--step-tokens", type=int, default=2048, help="most tokens in one step")
    parser.add_argument("--quant", choices=("none", "8", "4", "fp8"), default="none")
    parser.add_argument("--save", type=Path, help="where rates are added as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    fd = os.memfd_create("mgpu-bench")
    spec = make_spec(arguments, fd)
    os.ftruncate(fd, spec.shared_bytes)
    settings = Settings(
        spec, arguments.rows, arguments.context, arguments.top, arguments.laps, arguments.stress, arguments.prefill
    )
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", -1, lock=False)
    found: Queue[tuple[list[Row], list[str]]] = context.Queue()
    path = f"/proc/{os.getpid()}/fd/{fd}"
    ranks = [
        context.Process(target=run_rank, args=(settings, rank, path, done, found))
        for rank in range(spec.layout.placement.world_size)
    ]
    for each in ranks:
        each.start()
    try:
        while any(each.is_alive() for each in ranks) and not any(each.exitcode for each in ranks):
            time.sleep(0.1)
        failed = [rank for rank, each in enumerate(ranks) if each.exitcode]
        if not failed:
            save(arguments, *found.get(timeout=10.0))
    finally:
        for each in ranks:
            each.kill()
    sys.exit(f"ranks {failed} failed" if failed else 0)


if __name__ == "__main__":
    main()
