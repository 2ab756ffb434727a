"""``mgpu-launch bench idle``: what a server without requests takes of a core."""

import time

import click
import psutil

from mgpu.launch.bench.options import Wanted, seconds_option, target_options
from mgpu.launch.bench.report import Report, Row, spread
from mgpu.launch.bench.target import READY_S, prepared, started

SHOWN = ("processes", "core_share", "core_share_low", "core_share_high", "seconds")
SETTLE_S = 1.0
"""Wait after the start: its last work, such as a garbage collection, is not idling."""


@click.command("idle", short_help="Count the processor time of an idle server.")
@target_options
@seconds_option(10.0, "How long each look takes.")
def idle_command(wanted: Wanted, seconds: float) -> None:
    """Let a server idle, and count the processor time of all its processes as a share of one core."""
    with prepared(wanted) as target, started(target) as server:
        server.wait_ready(READY_S)
        time.sleep(SETTLE_S)
        report = Report("idle", "mgpu", SHOWN, wanted.save, "psutil", "pyzmq", **target.facts)
        shares = [idle_share(server.process.pid, seconds) for _ in range(wanted.repeat)]
        count = len(family(server.process.pid))
        row: Row = {"processes": count, "seconds": seconds, "repeats": len(shares)}
        report.add(row | spread("core_share", shares))


def idle_share(pid: int, seconds: float) -> float:
    """Return the processor time of a process and all that it started over ``seconds``, as a share of one core."""
    before, began_s = cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.monotonic() - began_s)


def family(pid: int) -> list[psutil.Process]:
    """List a process and its descendants."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process and its descendants have used so far."""
    times = [process.cpu_times() for process in family(pid)]
    return float(sum(each.user + each.system for each in times))
