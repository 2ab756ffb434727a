"""How long until a server is ready: kernels compiled or not, weights made in place or read from the page cache."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.model_shapes import write_config, write_weights
from bench.performance.rows import (
    BENCH,
    FAILED,
    READY,
    READY_COLD,
    READY_FILES,
    READY_PEER,
    SHOWN,
    last_line,
    missing,
    row,
)
from bench.performance.server import Place, failures_noted
from mgpu.launch.bench.report import Report, Row, spread
from mgpu.launch.bench.startup import KERNEL_CACHE, start_once
from mgpu.launch.bench.target import prepared
from mgpu.protocol.checkpoint.read import read_checkpoint

PEER_S = 240.0
ROOT = Path(__file__).parents[2]


def measure_ready(place: Place, shape: str, save: Path) -> None:
    """Start servers of a shape, and transformers with the same files; rows are saved as they come."""
    config, repeat = place.effort.config(shape), place.effort.repeat
    model = write_config(place.folder / shape, config)
    with prepared(place.wanted(model)) as target, tempfile.TemporaryDirectory(prefix="mgpu-bench-") as kernels:
        report = Report(
            BENCH, "mgpu", SHOWN, save, "triton", "pyzmq", "transformers", shape=shape, **place.facts, **target.facts
        )
        environ = {KERNEL_CACHE: kernels}
        with failures_noted(report):
            report.add(started(READY_COLD, [start_once(target, environ)]))
            report.add(started(READY, [start_once(target, environ) for _ in range(repeat)]))
        files = place.folder / f"{shape}-weights"
        if problem := no_room(model, place.folder):
            report.add(missing(READY_FILES, 0, 0, problem))
            return
        write_weights(files, config)
        try:
            with failures_noted(report), prepared(place.wanted(files)) as target:
                report.add(started(READY_FILES, [start_once(target, environ) for _ in range(repeat)]))
            report.add(peer_ready(files, target.plan.machine.kind))
        finally:
            shutil.rmtree(files)


def started(what: str, times: Sequence[dict[str, float]]) -> Row:
    """Make a row of starts: the whole, and every phase beside it."""
    found = row(what, 0, 0, "s", [each["ready"] for each in times])
    for phase in times[0].keys() - {"ready"}:
        found |= spread(f"{phase}_s", [each.get(phase, 0.0) for each in times])
    return found


def no_room(model: Path, folder: Path) -> str:
    """Say why a model's weights cannot be written; empty if they can."""
    needed = sum(entry.nbytes for entry in read_checkpoint(model, "dummy").tensors.values())
    free = shutil.disk_usage(folder).free
    return f"left out: {needed / 1e9:.0f} GB of weights, {free / 1e9:.0f} GB of disk" if free < 1.05 * needed else ""


def peer_ready(files: Path, device: str) -> Row:
    """Load the same files with transformers, in a process of its own, and answer one token."""
    command = [sys.executable, "-m", "bench.peers.hf_ready", str(files), device]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PEER_S, check=True, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return missing(READY_PEER, 0, 0, f"not ready after {PEER_S:g} s")
    except subprocess.CalledProcessError as error:
        return missing(READY_PEER, 0, 0, f"{FAILED}: {last_line(error.stderr)}")
    return row(READY_PEER, 0, 0, "s", [float(done.stdout.split()[-1])])
