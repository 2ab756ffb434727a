"""Build a machine that the user describes, to plan for GPUs that are not here."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from mgpu.orchestrator.errors import DeviceError
from mgpu.orchestrator.placement.machine.devices import (
    MAX_WORKERS,
    DeviceInfo,
    Machine,
    cpu_machine,
    host_memory,
    nccl_problem,
    uniform_links,
)
from mgpu.orchestrator.placement.machine.gpu_facts import GPUS, GpuFacts, find_gpu
from mgpu.orchestrator.placement.machine.nvml import Link
from mgpu.protocol.model.c_compiler import c_compiler

DESCRIBED_BYTES = 80 << 30
"""Memory of each GPU of a machine described by a count alone."""
_LINKS: tuple[Link, ...] = ("nvlink", "pcie", "none")
"""From the best to the worst."""
_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))


def described_machine(text: str, environ: Mapping[str, str] = os.environ) -> Machine:
    """Build a machine of empty GPUs from ``4`` (of 80 GiB), ``141GiB,80GiB``, ``2xH200`` or ``4x24GiB``.

    GPUs of a known kind are linked as they usually are, others by NVLink. DeviceError for anything else.
    """
    kinds = [DESCRIBED_BYTES] * _count(text, text) if re.fullmatch(r"\s*[0-9]{1,5}\s*", text) else _kinds(text)
    if not kinds:
        return cpu_machine(1, ("no GPU is described: running on the CPU",))
    devices = tuple(_device(ordinal, kind) for ordinal, kind in enumerate(kinds))
    names = tuple(kind.name if isinstance(kind, GpuFacts) else _size_text(kind) for kind in kinds)
    link = max((kind.link if isinstance(kind, GpuFacts) else "nvlink" for kind in kinds), key=_LINKS.index)
    between = {"nvlink": "NVLink", "pcie": "PCIe", "none": "no direct access"}[link]
    note = f"a described machine: empty GPUs, {between} between all of them"
    links, problem = uniform_links(len(devices), link), nccl_problem(environ)
    has_compiler = c_compiler() is not None  # of this machine, as its memory
    return Machine(
        devices, links, problem, notes=(note,), kinds=names, host_bytes=host_memory(), has_compiler=has_compiler
    )


def kinds_text(kinds: Sequence[str]) -> str:
    """Write GPUs as ``--gpus`` takes them: a count if all are of the usual size, else each kind with its count."""
    if set(kinds) == {_size_text(DESCRIBED_BYTES)}:
        return str(len(kinds))
    groups = ((kind, len(list(group))) for kind, group in groupby(kinds))
    return ",".join(f"{count}x{kind}" for kind, count in groups)


def _size_text(size: int) -> str:
    """Write a size in the largest unit that divides it."""
    unit, scale = next((unit, scale) for unit, scale in _UNITS if size % scale == 0)
    return f"{size // scale}{unit}"


def _count(text: str, whole: str) -> int:
    if int(text) > MAX_WORKERS:
        hint = f"; for a kind of GPU, write 1x{text.strip()}" if find_gpu(text) else ""
        raise DeviceError(f"--gpus {whole[:80]}: it must be between 0 and {MAX_WORKERS}{hint}")
    return int(text)


def _kinds(text: str) -> list[int | GpuFacts]:
    kinds: list[int | GpuFacts] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([0-9]{1,5})\s*[x*]\s*)?(.*?)\s*", part, re.IGNORECASE | re.DOTALL)
        assert match is not None
        kind = find_gpu(match[2]) if re.search("[A-Za-z]", match[2]) or match[1] else None
        kinds += [kind or _parse_size(match[2], text)] * _count(match[1] or "1", text)
    if len(kinds) > MAX_WORKERS:
        raise DeviceError(f"--gpus {text[:80]}: it must be between 0 and {MAX_WORKERS}")
    return kinds


def _device(ordinal: int, kind: int | GpuFacts) -> DeviceInfo:
    at = f"described-{ordinal}", str(ordinal)
    if isinstance(kind, int):
        return DeviceInfo(ordinal, "cuda", "described GPU", kind, kind, *at)
    return DeviceInfo(ordinal, "cuda", kind.name, kind.memory_bytes, kind.memory_bytes, *at, kind.capability)


def _parse_size(part: str, text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([KMGT]i?)?B?", part, re.IGNORECASE)
    if match is None:
        names = [gpu.name for gpu in GPUS]
        near = difflib.get_close_matches(part[:80].upper(), names, n=1)
        way_out = f"did you mean {near[0]}? " if near else ""
        raise DeviceError(
            f'--gpus {text[:80]!r}: {way_out}write a count such as "4", sizes such as "141GiB,80GiB", or kinds such as '
            f'"2xH200"; known kinds: {", ".join(names)}'
        )
    unit = (match[2] or "").upper()
    scale = 1 if not unit else (1024 if unit.endswith("I") else 1000) ** ("KMGT".index(unit[0]) + 1)
    size = int(float(match[1]) * scale)
    if not 1 << 20 <= size <= 1 << 50:
        raise DeviceError(f"--gpus {text[:80]!r}: {part} is not a plausible GPU memory size")
    return size
