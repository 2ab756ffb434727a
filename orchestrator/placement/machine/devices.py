"""Find the devices to place a model on: visible GPUs, CPU workers, or a machine that the user describes."""

import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import psutil

from mgpu.orchestrator.errors import DeviceError, NoDeviceError
from mgpu.orchestrator.placement.machine.control_groups import memory_within_limits
from mgpu.orchestrator.placement.machine.cpu_features import cpu_flags
from mgpu.orchestrator.placement.machine.numa import numa_node
from mgpu.orchestrator.placement.machine.nvml import Gpu, Link, Nvml, NvmlSession
from mgpu.protocol.model.c_compiler import c_compiler
from mgpu.protocol.model.shared_memory_layout import orders_stores

DeviceChoice = Literal["auto", "cuda", "cpu"]

MAX_WORKERS = 1024
NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values that hide all GPUs; Slurm writes the last one."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device that a worker can have. ``ordinal`` is the number that users type."""

    ordinal: int
    kind: Literal["cpu", "cuda"]
    name: str
    total_bytes: int
    free_bytes: int
    uuid: str = ""
    selector: str = ""
    """Its name in CUDA_VISIBLE_DEVICES: the index in PCI bus order, or a MIG UUID."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None: not known, or no GPU."""
    bytes_per_s: float = 0.0
    """How fast it reads its memory, by the driver's clock and bus width; 0: not known."""
    busy: float = 0.0
    """Share of the last second in which some process used it."""
    speed: float = 1.0
    """Share of its speed that was measured beside other processes; 1: not measured."""
    numa_node: int = -1
    """Node of its PCI slot; -1: not known."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The visible devices and how they reach each other."""

    devices: tuple[DeviceInfo, ...]
    links: tuple[tuple[Link, ...], ...]
    nccl_problem: str
    """Why NCCL cannot be used; empty if it can."""
    shared_memory: bool = False
    """True if CPU workers can sum in shared memory: its protocol relies on the store order of x86-64."""
    notes: tuple[str, ...] = ()
    """Lines for the start-up log."""
    kinds: tuple[str, ...] = ()
    """How ``--gpus`` writes each GPU of a described machine; empty for a real one."""
    distances: tuple[tuple[int, ...], ...] = ()
    """How far up the PCI tree each two GPUs meet, in NVML's levels; empty: not known."""
    host_bytes: tuple[int, int] = (0, 0)
    """Total and free bytes of the memory beside the GPUs, which CPU workers could use."""
    hosts: tuple[str, ...] = ()
    """The host of each device, if they are of hosts that have joined; empty: all are of this machine."""
    cpu_flags: frozenset[str] = frozenset()
    """What the processor can do, if workers run on it; none of a described machine."""
    has_compiler: bool = False
    """True if workers can compile their kernels for the CPU."""

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        return self.devices[0].kind

    @property
    def nccl(self) -> bool:
        return not self.nccl_problem

    @property
    def least_bytes(self) -> int:
        """Memory of the smallest GPU, or of the smallest CPU worker where there are none."""
        return min(device.total_bytes for device in self.gpus or self.devices)

    @property
    def gpus(self) -> tuple[DeviceInfo, ...]:
        """The devices that are GPUs."""
        return tuple(device for device in self.devices if device.kind == "cuda")

    def peers(self, first: int, second: int) -> bool:
        """Return True if two devices, by ordinal, can reach each other's memory."""
        return not {self.links[first][second], self.links[second][first]} & {"none", "broken"}

    @property
    def has_broken_pairs(self) -> bool:
        """True if a trial has shown that peer access between some devices does not work although it is announced."""
        return any("broken" in row for row in self.links)


def find_machine(
    device: DeviceChoice = "auto",
    workers: int | None = None,
    oversubscribe: bool = False,
    environ: Mapping[str, str] = os.environ,
    nvml: Nvml | None = None,
) -> Machine:
    """Describe this machine. ``workers`` is the number of CPU workers, or of GPU workers with ``oversubscribe``.

    ``auto`` takes the visible GPUs, else the CPU. NoDeviceError when the user asked for GPUs and none is visible,
    DeviceError when the number of workers is impossible.
    """
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise DeviceError(f"--workers {workers}: it must be between 1 and {MAX_WORKERS}")
    if device == "cpu":
        return cpu_machine(workers or 1)
    machine, problem = _gpu_machine(environ, nvml)
    if machine is None:
        if device == "cuda":
            raise NoDeviceError(f"--device cuda: no GPU is visible ({problem}); --device cpu runs without one")
        return cpu_machine(workers or 1, (f"no GPU is visible ({problem}): running on the CPU",))
    if oversubscribe:
        return oversubscribed(machine, workers or len(machine.devices))
    if workers is not None and workers != len(machine.devices):
        raise DeviceError(
            f"--workers {workers}: there is one worker per GPU, and {len(machine.devices)} are visible. Use --tp N for "
            "the first N GPUs, --oversubscribe to share them, or --device cpu"
        )
    return machine


def _gpu_machine(environ: Mapping[str, str], nvml: Nvml | None) -> tuple[Machine | None, str]:
    """Return the machine of visible GPUs, or None and the reason why there are none."""
    variable = environ.get("CUDA_VISIBLE_DEVICES")
    with NvmlSession(nvml) as session:
        inventory = session.inventory()
        if not inventory.gpus:
            return None, inventory.problem
        gpus = visible_gpus(inventory.gpus, variable)
        check_answers(inventory.gpus, gpus)
        if not gpus:
            return None, f"CUDA_VISIBLE_DEVICES={variable} hides {len(inventory.gpus)}"
        devices = tuple(_device(ordinal, gpu) for ordinal, gpu in enumerate(gpus))
        problem = nccl_problem(environ, any(gpu.mig for gpu in gpus)) or missing_nccl()
        links, distances = session.links(gpus), session.distances(gpus)
        note = order_note(inventory.gpus, variable)
    if environ.get("MGPU_NO_P2P") == "1":
        links = tuple(tuple("none" for _ in row) for row in links)
    shared, notes = orders_stores(), (note,) if note else ()
    host, has_compiler = host_memory(), c_compiler() is not None
    machine = Machine(devices, links, problem, shared, notes, distances=distances, host_bytes=host)
    return replace(machine, has_compiler=has_compiler), ""


def check_answers(known: Sequence[Gpu], visible: Sequence[Gpu]) -> None:
    """Raise DeviceError if a visible GPU does not answer the driver. Those that are not visible may be lost."""
    lost = next((gpu for gpu in visible if gpu.problem), None)
    if lost is not None:
        healthy = ",".join(str(gpu.index) for gpu in known if not gpu.problem and not gpu.mig)
        hint = f"; CUDA_VISIBLE_DEVICES={healthy} leaves it out" if healthy else ""
        raise DeviceError(f"a GPU does not answer the driver: GPU {lost.index}: {lost.problem}{hint}; see `nvidia-smi`")


def _device(ordinal: int, gpu: Gpu) -> DeviceInfo:
    selector = gpu.uuid if gpu.mig else str(gpu.index)
    size = gpu.total_bytes, gpu.free_bytes
    return DeviceInfo(
        ordinal, "cuda", gpu.name, *size, gpu.uuid, selector, gpu.capability, gpu.bytes_per_s, gpu.busy,
        numa_node=numa_node(gpu.pci),
    )  # fmt: skip


def visible_gpus(gpus: Sequence[Gpu], variable: str | None) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in PCI bus order like ``gpus``; None means unset: all of them.

    Ordinals count these, so they follow the order of `nvidia-smi` whatever the order in the variable.
    """
    named = {gpu.uuid for gpu in named_gpus(gpus, variable)}
    return [gpu for gpu in gpus if gpu.uuid in named]


def order_note(gpus: Sequence[Gpu], variable: str | None) -> str:
    """Return a note on which GPU each ordinal is if the variable names them in another order; else an empty text."""
    visible = visible_gpus(gpus, variable)
    if [gpu.uuid for gpu in visible] == [gpu.uuid for gpu in named_gpus(gpus, variable)]:
        return ""
    ordinals = ", ".join(f"{i} is {gpu.uuid if gpu.mig else f'GPU {gpu.index}'}" for i, gpu in enumerate(visible))
    return f"CUDA_VISIBLE_DEVICES={variable} chooses GPUs but not their order, which is that of the PCI bus: {ordinals}"


def named_gpus(gpus: Sequence[Gpu], variable: str | None) -> list[Gpu]:
    """Return the GPUs that the variable names, in its order.

    Entries are indices in PCI bus order, UUIDs or unique beginnings of UUIDs (``GPU-…``, ``MIG-…``). CUDA silently
    stops at the first entry that it cannot resolve; here that entry is a DeviceError.
    """
    if variable is None:
        return _default_gpus(gpus)
    if variable.strip() in NO_DEVICES:
        return []
    chosen: list[Gpu] = []
    for entry in variable.split(","):
        gpu = _usable(gpus, _resolve(gpus, entry.strip(), variable))
        if any(gpu.uuid == other.uuid for other in chosen):
            raise DeviceError(f"CUDA_VISIBLE_DEVICES={variable} names {gpu.name} ({gpu.uuid}) twice")
        chosen.append(gpu)
    return chosen


def _default_gpus(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Return what CUDA offers without a choice: the whole GPUs, or one MIG instance if there are none."""
    cut = {gpu.pci for gpu in gpus if gpu.mig}
    whole = [gpu for gpu in gpus if gpu.pci not in cut]
    return whole or [gpu for gpu in gpus if gpu.mig][:1]


def _usable(gpus: Sequence[Gpu], gpu: Gpu) -> Gpu:
    """Return the GPU, or its first MIG instance: CUDA cannot use a GPU with MIG instances as a whole."""
    return next((other for other in gpus if other.mig and other.pci == gpu.pci and not gpu.mig), gpu)


def _resolve(gpus: Sequence[Gpu], entry: str, variable: str) -> Gpu:
    if re.fullmatch(r"[0-9]{1,9}", entry):
        matches = [gpu for gpu in gpus if gpu.index == int(entry)]
    elif re.fullmatch(r"(GPU|MIG)-.+", entry, re.IGNORECASE):
        matches = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
    else:
        raise _visible_error(gpus, variable, f"{entry[:60]!r} is neither an index nor a GPU UUID")
    if len(matches) > 1:
        raise _visible_error(gpus, variable, f"{entry!r} begins the UUID of {len(matches)} devices; write more of it")
    if not matches:
        raise _visible_error(gpus, variable, f"{entry[:60]!r} is not a GPU of this machine")
    return matches[0]


def _visible_error(gpus: Sequence[Gpu], variable: str, problem: str) -> DeviceError:
    known = ", ".join(gpu.uuid if gpu.mig else str(gpu.index) for gpu in gpus) or "none"
    return DeviceError(f"CUDA_VISIBLE_DEVICES={variable[:200]}: {problem}; GPUs here: {known}")


def nccl_problem(environ: Mapping[str, str], mig: bool = False) -> str:
    """Return why NCCL must not be used; empty when it may."""
    if environ.get("MGPU_NO_NCCL") == "1":
        return "MGPU_NO_NCCL=1"
    if mig:
        return "NCCL does not connect MIG instances"
    return ""


def missing_nccl() -> str:
    """Return a text that names the NCCL package that torch needs and lacks; empty when none is missing."""
    try:
        needs = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for name in (re.split(r"[ ;<>=!~\[(]", need, maxsplit=1)[0] for need in needs if need.startswith("nvidia-nccl")):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"NCCL is not installed (torch asks for {name})"
    return ""


def cpu_machine(workers: int, notes: tuple[str, ...] = ()) -> Machine:
    """Return a machine of N workers that share the cores and the memory of this one."""
    total, free = host_memory()
    devices = tuple(
        DeviceInfo(ordinal, "cpu", f"CPU worker {ordinal}", total // workers, free // workers)
        for ordinal in range(workers)
    )
    return Machine(
        devices,
        uniform_links(workers, "none"),
        "NCCL needs GPUs",
        orders_stores(),
        notes,
        cpu_flags=cpu_flags(),
        has_compiler=c_compiler() is not None,
    )


def uniform_links(count: int, between: Link) -> tuple[tuple[Link, ...], ...]:
    """Return the links of devices that all reach each other in the same way."""
    return tuple(tuple("self" if a == b else between for b in range(count)) for a in range(count))


def host_memory() -> tuple[int, int]:
    """Return total and available bytes, within the limits of this process's control groups."""
    memory = psutil.virtual_memory()
    return memory_within_limits(int(memory.total), int(memory.available))


def oversubscribed(machine: Machine, workers: int) -> Machine:
    """Return a machine on which N workers share the GPUs, round-robin; for tests only."""
    count = len(machine.devices)
    sharers = [len(range(first, workers, count)) for first in range(count)]
    devices = tuple(
        replace(
            (shared := machine.devices[i % count]),
            ordinal=i,
            total_bytes=shared.total_bytes // sharers[i % count],
            free_bytes=shared.free_bytes // sharers[i % count],
        )
        for i in range(workers)
    )
    links = tuple(tuple(machine.links[a % count][b % count] for b in range(workers)) for a in range(workers))
    if workers <= count:
        return replace(machine, devices=devices, links=links)
    note = f"{workers} workers share {count} GPU{'s' if count > 1 else ''} (--oversubscribe): expect it to be slow"
    problem = "NCCL refuses two ranks on one GPU"
    return replace(
        machine,
        devices=devices,
        links=links,
        nccl_problem=problem,
        notes=(*machine.notes, note),
        kinds=(),
        distances=(),
    )


def worker_environment(machine: Machine, ordinal: int) -> tuple[dict[str, str], str]:
    """Return what a worker's environment needs, and its device under that environment: ``cpu`` or ``cuda:N``.

    All workers see the same GPUs in the same order, so that peers can map each other's memory. A process can use only
    one MIG instance, so it sees that one alone.
    """
    device = machine.devices[ordinal]
    if device.kind == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}, "cpu"
    uuids = list(dict.fromkeys(other.uuid for other in machine.devices if other.kind == "cuda"))
    if device.uuid.startswith("MIG-"):
        uuids = [device.uuid]
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids)}
    if machine.has_broken_pairs:
        environment["NCCL_P2P_DISABLE"] = "1"  # it knows no single pairs
    return environment, f"cuda:{uuids.index(device.uuid)}"


def selectors(devices: Sequence[DeviceInfo]) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES that makes exactly these devices visible."""
    return ",".join(device.selector for device in devices)
