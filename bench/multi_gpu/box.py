"""The devices that `multi_gpu.py` runs on: real GPUs, CPU workers in their place, or workers that share a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mgpu.launch.server_process import ServerProcess
from mgpu.orchestrator.placement.machine.devices import Machine, find_machine, selectors
from mgpu.orchestrator.placement.machine.nvml import NvmlSession

Kind = Literal["gpus", "shared", "cpu"]
START_S = 150.0
PLAN_S = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """Some of the devices, as options and environment of a command."""

    options: tuple[str, ...]
    environ: Mapping[str, str]
    size: int


@dataclass(frozen=True, slots=True)
class Box:
    """All devices there are."""

    kind: Kind
    machine: Machine

    @property
    def size(self) -> int:
        return len(self.machine.devices)

    @property
    def sizes(self) -> list[int]:
        """Powers of two up to all devices, 8 at most."""
        return [size for size in (1, 2, 4, 8) if size <= self.size]

    def place(self, devices: Sequence[int]) -> Place:
        """Make these devices, by ordinal, the only visible ones, in this order. CPU workers have no identity."""
        if self.kind == "cpu":
            return Place(("--device", "cpu", "--workers", str(len(devices))), {}, len(devices))
        if self.kind == "shared":
            return Place(("--oversubscribe", "--workers", str(len(devices))), {}, len(devices))
        chosen = selectors([self.machine.devices[device] for device in devices])
        return Place((), {"CUDA_VISIBLE_DEVICES": chosen}, len(devices))

    def first(self, count: int) -> Place:
        return self.place(range(count))

    def used_bytes(self) -> dict[str, int]:
        """Return the used bytes of each GPU by UUID, from the driver; empty without GPUs."""
        with NvmlSession() as session:
            gpus = session.inventory().gpus
        wanted = {device.uuid for device in self.machine.devices}
        return {gpu.uuid: gpu.total_bytes - gpu.free_bytes for gpu in gpus if gpu.uuid in wanted}


def find_box(rehearse: bool, devices: int, share: int) -> Box:
    """Find the GPUs, or make up ``devices`` CPU workers to rehearse with, or ``share`` workers on the GPUs."""
    if rehearse:
        return Box("cpu", find_machine("cpu", devices))
    if share:
        return Box("shared", find_machine("cuda", share, oversubscribe=True))
    return Box("gpus", find_machine("cuda"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command that ends by itself said."""

    status: int
    output: str


def run_command(command: str, place: Place, *arguments: str, environ: Mapping[str, str] | None = None) -> Answer:
    """Run ``mgpu-launch plan`` or a ``serve`` that must be refused."""
    ran = subprocess.run(
        [sys.executable, "-m", "mgpu.launch.cli", command, *place.options, *arguments],
        env={**os.environ, **place.environ, **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PLAN_S,
    )
    return Answer(ran.returncode, ran.stdout)


def plan_of(place: Place, *arguments: str, environ: Mapping[str, str] | None = None) -> dict[str, object]:
    """Return the layout that `serve` would choose. ValueError with the command's own words where it refuses."""
    answer = run_command("plan", place, "--json", *arguments, environ=environ)
    if answer.status:
        raise ValueError(answer.output.strip().removeprefix("error: "))
    layout, _ = json.JSONDecoder().raw_decode(answer.output[answer.output.index("{") :])
    assert isinstance(layout, dict)
    return layout


def serving(place: Place, model: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> ServerProcess:
    """Start a server of a model; it ends with the block of its `with`."""
    both = {**place.environ, **(environ or {})}
    return ServerProcess("-m", str(model), *place.options, *arguments, environ=both)
