"""``mgpu-launch bench step``: where the time of a decode step goes, from the server's own counters."""

import subprocess
import sys
from pathlib import Path

import click

from mgpu.launch.bench.decode import cannot_run
from mgpu.launch.bench.options import Wanted, list_option, seconds_option, target_options
from mgpu.launch.bench.probe import Decoded, NotMeasured, Probe
from mgpu.launch.bench.report import Report, Row, spread
from mgpu.launch.bench.target import prepared, probing
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.machine.devices import find_machine

PARTS = ("schedule", "publish", "apply")
SHOWN = ("batch", "wall_us", *(f"{part}_us" for part in PARTS), "worker_us", "starved_us", "occupancy_share")


@click.command("step")
@target_options
@list_option("--batches", "1,8,64", "Streams that decode at once.")
@click.option("--context", type=click.IntRange(1), default=128, show_default=True, help="Tokens of each prompt.")
@seconds_option(1.0, "Seconds that each run is counted.")
@click.option("--kernels", is_flag=True, help="Profile one worker's GPU kernels instead (bench/step.py; needs a GPU).")
def step_command(wanted: Wanted, batches: tuple[int, ...], context: int, seconds: float, kernels: bool) -> None:
    """Break decode steps down, in µs per step.

    wall: from one result to the next. schedule, publish, apply: the orchestrator's work. worker: from the beginning of
    a step in the worker to its tokens on the host; with two steps in flight this includes waiting for the one before.
    starved: no step was in flight, so that the workers had nothing to do; occupancy is the rest of the wall time.
    """
    if kernels:
        profile_kernels(batches, context)
        return
    with prepared(wanted) as target, probing(target) as probe:
        report = Report("step", "mgpu", SHOWN, wanted.save, "pyzmq", "triton", context=context, **target.facts)
        for batch in batches:
            problem = cannot_run(batch, context, target.config.max_rows, probe.kv_tokens)
            left_out: Row = {"batch": batch, "note": problem}
            report.add(left_out if problem else step_row(probe, batch, context, seconds, wanted.repeat))


def step_row(probe: Probe, batch: int, context: int, seconds: float, repeat: int) -> Row:
    """Measure one batch size."""
    row: Row = {"batch": batch, "repeats": repeat}
    try:
        probe.decode(batch, context, 0.0)
        runs = [breakdown(probe.decode(batch, context, seconds)) for _ in range(repeat)]
    except NotMeasured as problem:
        return row | {"note": str(problem)}
    for name in runs[0]:
        row |= spread(name, [run[name] for run in runs])
    return row


def breakdown(decoded: Decoded) -> dict[str, float]:
    """Return microseconds per step between two looks at the counters. NotMeasured without a step."""
    before, after, seconds = decoded.before, decoded.after, decoded.seconds
    steps = after["steps"] - before["steps"]
    if steps <= 0:
        raise NotMeasured(f"no step ended within {seconds:g} s; raise --seconds")
    parts = {f"{part}_us": (after[f"{part}_us_sum"] - before[f"{part}_us_sum"]) / steps for part in PARTS}
    worker = (after["compute_us_sum"] - before["compute_us_sum"]) / steps
    starved = (after["starved_us_sum"] - before["starved_us_sum"]) / steps
    wall = seconds * 1e6 / steps
    return {"wall_us": wall, **parts, "worker_us": worker, "starved_us": starved, "occupancy_share": 1 - starved / wall}


def profile_kernels(batches: tuple[int, ...], context: int) -> None:
    """Run the repository's script, which imports torch. UserError without repository or when it fails."""
    root = Path(__file__).resolve().parents[2]
    script = root / "bench" / "step.py"
    if not script.is_file():
        raise UserError(f"--kernels runs {script}, which is only in the repository; clone it and install it from there")
    find_machine("cuda")  # says what is missing
    command = [sys.executable, "-m", "bench.step", "--rows", ",".join(map(str, batches)), "--context", str(context)]
    if status := subprocess.run(command, check=False, stdin=subprocess.DEVNULL, cwd=root).returncode:
        raise UserError(f"{' '.join(command)} ended with status {status}")
