"""All checks, in the order in which one depends on another."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from mgpu.launch.doctor.finding import Finding, fail
from mgpu.launch.doctor.gpus import check_driver, check_links, check_pairs, check_peer_memory, check_torch
from mgpu.launch.doctor.hub import check_hub
from mgpu.launch.doctor.machine import check_folders, check_limits, check_memory, check_shared_memory, check_software
from mgpu.launch.doctor.probes import Trial
from mgpu.orchestrator.placement.machine.nvml import Nvml
from mgpu.orchestrator.placement.machine.pair_check import PAIR_RECORD
from mgpu.protocol.cache_root import cache_root


def examine(
    offline: bool, deadline_s: float, environ: Mapping[str, str] = os.environ, nvml: Nvml | None = None
) -> Iterator[Finding]:
    """Yield what each check finds, as soon as it is known. ``deadline_s`` is for each process that tries torch."""
    yield from check_software()
    yield from check_memory()
    found, machine = check_driver(environ, nvml)
    yield from found
    yield from check_limits(cuda=machine is not None)
    yield from check_shared_memory(len(machine.devices) if machine else 0)
    yield from check_folders(environ)
    yield check_hub(environ, offline)
    if machine is not None:
        yield from check_links(machine)
        yield from check_peer_memory(machine, environ, cache_root(environ) / PAIR_RECORD)
    try:
        folder = tempfile.TemporaryDirectory(prefix="mgpu-doctor-", ignore_cleanup_errors=True)
    except OSError as error:
        yield fail("torch", f"no folder for temporary files: {error}", "set TMPDIR=/a/folder/that/you/can/write/to")
        return
    with folder as path:
        trial = Trial(Path(path), environ, deadline_s)
        yield from check_torch(machine, trial)
        yield from check_pairs(machine, trial)
