"""Apply CUDA_VISIBLE_DEVICES to the GPUs of a machine, with CUDA's rules but an error where CUDA would ignore."""

import re
from collections.abc import Sequence

from mgpu.orchestrator.errors import DeviceError
from mgpu.orchestrator.placement.nvml import Gpu

NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values that hide all GPUs; Slurm writes the last one."""


def visible_gpus(gpus: Sequence[Gpu], variable: str | None) -> list[Gpu]:
    """Give the GPUs that CUDA_VISIBLE_DEVICES leaves, in PCI bus order like ``gpus``; None: unset, all of them.

    Ordinals count these, so that they are in the order of `nvidia-smi` whatever order the variable has.
    """
    named = {gpu.uuid for gpu in named_gpus(gpus, variable)}
    return [gpu for gpu in gpus if gpu.uuid in named]


def order_note(gpus: Sequence[Gpu], variable: str | None) -> str:
    """Say which GPU each ordinal is where the variable names them in another order; else empty."""
    visible = visible_gpus(gpus, variable)
    if [gpu.uuid for gpu in visible] == [gpu.uuid for gpu in named_gpus(gpus, variable)]:
        return ""
    ordinals = ", ".join(f"{i} is {gpu.uuid if gpu.mig else f'GPU {gpu.index}'}" for i, gpu in enumerate(visible))
    return f"CUDA_VISIBLE_DEVICES={variable} chooses GPUs but not their order, which is that of the PCI bus: {ordinals}"


def named_gpus(gpus: Sequence[Gpu], variable: str | None) -> list[Gpu]:
    """Give the GPUs that the variable names, in its order.

    Entries are indices in PCI bus order, UUIDs or unique beginnings of UUIDs (``GPU-…``, ``MIG-…``). CUDA silently
    stops at the first entry that it cannot resolve; here it is a DeviceError that names the entry.
    """
    if variable is None:
        return _all(gpus)
    if variable.strip() in NO_DEVICES:
        return []
    chosen: list[Gpu] = []
    for entry in variable.split(","):
        gpu = _usable(gpus, _resolve(gpus, entry.strip(), variable))
        if any(gpu.uuid == other.uuid for other in chosen):
            raise DeviceError(f"CUDA_VISIBLE_DEVICES={variable} names {gpu.name} ({gpu.uuid}) twice")
        chosen.append(gpu)
    return chosen


def _all(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Without a choice CUDA offers whole GPUs, and where there is none, one MIG instance."""
    cut = {gpu.pci for gpu in gpus if gpu.mig}
    whole = [gpu for gpu in gpus if gpu.pci not in cut]
    return whole or [gpu for gpu in gpus if gpu.mig][:1]


def _usable(gpus: Sequence[Gpu], gpu: Gpu) -> Gpu:
    """Give a GPU itself, or its first MIG instance: CUDA cannot use one that is cut up as a whole."""
    return next((other for other in gpus if other.mig and other.pci == gpu.pci and not gpu.mig), gpu)


def _resolve(gpus: Sequence[Gpu], entry: str, variable: str) -> Gpu:
    if re.fullmatch(r"[0-9]{1,9}", entry):
        matches = [gpu for gpu in gpus if gpu.index == int(entry)]
    elif re.fullmatch(r"(GPU|MIG)-.+", entry, re.IGNORECASE):
        matches = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
    else:
        raise _error(gpus, variable, f"{entry[:60]!r} is neither an index nor a GPU UUID")
    if len(matches) > 1:
        raise _error(gpus, variable, f"{entry!r} begins the UUID of {len(matches)} devices; write more of it")
    if not matches:
        raise _error(gpus, variable, f"{entry[:60]!r} is not a GPU of this machine")
    return matches[0]


def _error(gpus: Sequence[Gpu], variable: str, problem: str) -> DeviceError:
    known = ", ".join(gpu.uuid if gpu.mig else str(gpu.index) for gpu in gpus) or "none"
    return DeviceError(f"CUDA_VISIBLE_DEVICES={variable[:200]}: {problem}; GPUs here: {known}")
