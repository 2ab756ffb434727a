"""Measure GPUs that other processes keep busy, before layers are divided by their speed."""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

from mgpu.orchestrator.placement.machine.devices import Machine, worker_environment
from mgpu.orchestrator.placement.machine.gpu_facts import find_gpu
from mgpu.orchestrator.placement.machine.pair_check import end_trial, start_trial
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.planner import Plan

PROBE = (sys.executable, "-m", "mgpu.worker.probes.speed")
LEAST_BUSY = 0.1
"""Share of the last second; what is less hardly slows a stage."""
_COPIES_AT = 0.896
"""Share of the data sheet's bandwidth that a copy on an idle GPU reaches (docs/performance.md)."""
_DEADLINE_S = 30.0

log = logging.getLogger(__name__)


def needs_measuring(plan: Plan, options: LayoutOptions) -> bool:
    """Return True for layers that were divided automatically over GPUs of which one is busy."""
    is_asked = options.device_layers is not None or (options.topology is not None and options.topology.places)
    return plan.mode == "layer-mapped" and not is_asked and any(gpu.busy >= LEAST_BUSY for gpu in plan.machine.gpus)


def measured(machine: Machine, command: tuple[str, ...] = PROBE) -> Machine:
    """Return the machine with the share of its speed that each GPU has just now; unchanged if that is not known."""
    environment, _ = worker_environment(machine, 0)
    try:
        said = _said_by(command, os.environ | environment)
        answer = {int(number): float(speed) for number, speed in json.loads(said).items()}
        speeds = {number: speed for number, speed in answer.items() if 0 < speed < math.inf}
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError, TypeError) as error:
        log.warning("the speed of busy GPUs is not known: %s", str(error).splitlines()[0])
        return machine
    uuids = list(dict.fromkeys(device.uuid for device in machine.gpus))
    shares = {uuids[number]: speed for number, speed in speeds.items() if number < len(uuids)}
    fastest = {device.name: max(shares.get(other.uuid, 0.0) for other in machine.gpus if other.name == device.name)
               for device in machine.gpus}  # fmt: skip
    devices = []
    for device in machine.devices:
        known = find_gpu(device.name)
        whole = known.bytes_per_s * _COPIES_AT if known else fastest.get(device.name, 0.0)
        share = min(1.0, shares[device.uuid] / whole) if device.uuid in shares and whole else 1.0
        devices.append(replace(device, speed=share))
    return replace(machine, devices=tuple(devices))


def _said_by(command: tuple[str, ...], environment: Mapping[str, str]) -> bytes:
    """Return what a probe writes. subprocess.SubprocessError if it fails or is late; then it is killed."""
    process = start_trial(command, environment)
    try:
        said, _ = process.communicate(timeout=_DEADLINE_S)
    finally:
        end_trial(process)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return said
