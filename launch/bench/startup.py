"""``mgpu-launch bench startup``: how long until a server is ready, by phase, cold and warm."""

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from mgpu.launch.bench.options import Wanted, target_options
from mgpu.launch.bench.report import Report, Row, spread
from mgpu.launch.bench.target import READY_S, Target, prepared, started

PHASES = ("spawn", "rendezvous", "weights", "cache", "warmup")
SHOWN = ("start", "ready_s", "ready_s_low", "ready_s_high", *(f"{phase}_s" for phase in PHASES))
KERNEL_CACHE = "TRITON_CACHE_DIR"
_READY = re.compile(r"ready in [\d.]+ s  \[(.*)\]")


@click.command("startup")
@target_options
def startup_command(wanted: Wanted) -> None:
    """Start and stop a server several times.

    ``cold``, once: no kernel is compiled yet, and the model's files are dropped from the page cache. ``warm``: what
    follows. ``ready_s`` is from the start of the command until clients can connect.
    """
    with prepared(wanted) as target, tempfile.TemporaryDirectory(prefix="mgpu-bench-") as kernels:
        environ = {KERNEL_CACHE: kernels}
        report = Report("startup", "mgpu", SHOWN, wanted.save, "triton", **target.facts)
        drop_from_page_cache(target.files)
        report.add(startup_row("cold", [start_once(target, environ)]))
        report.add(startup_row("warm", [start_once(target, environ) for _ in range(wanted.repeat)]))


def start_once(target: Target, environ: dict[str, str]) -> dict[str, float]:
    """Start and stop a server; return its phases and, as "ready", the whole, in seconds. UserError if it fails."""
    began_s = time.perf_counter()
    with started(target, environ=environ) as server:
        server.wait_ready(READY_S)
        ready_s = time.perf_counter() - began_s
        return {"ready": ready_s, **phases(server.output())}


def startup_row(start: str, times: Sequence[dict[str, float]]) -> Row:
    """Return medians of every phase, and the spread of the whole."""
    row: Row = {"start": start, "repeats": len(times)}
    for phase in times[0]:
        found = spread(f"{phase}_s", [each.get(phase, 0.0) for each in times])
        row |= found if phase == "ready" else {f"{phase}_s": found[f"{phase}_s"]}
    return row


def phases(log: str) -> dict[str, float]:
    """Read the seconds of each phase from what a server logs when it is ready; empty if it did not."""
    match = _READY.search(log)
    parts = match[1].split(" | ") if match else []
    return {name: float(seconds.split()[0]) for name, _, seconds in (part.partition(" ") for part in parts)}


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the contents of files; it may refuse, and then the cold start is a warm one."""
    for file in files:
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
