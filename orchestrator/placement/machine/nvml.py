"""Ask the NVIDIA driver for the GPUs of this machine, without creating a CUDA context."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, Protocol, cast

from mgpu.orchestrator.errors import DeviceError

Link = Literal["self", "nvlink", "pcie", "none", "broken"]
"""How one GPU reaches another's memory. ``none``: only through the host. ``broken``: so the driver says, but a trial
has shown that it does not (pair_check.py)."""

_P2P_READ, _P2P_WRITE, _P2P_NVLINK = 0, 1, 2
_P2P_OK = 0
_MEMORY_CLOCK = 2
ACROSS_SOCKETS = 50
"""NVML's level of two GPUs whose traffic crosses between processors: NVML_TOPOLOGY_SYSTEM."""


class _Memory(Protocol):
    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...


class _Pci(Protocol):
    @property
    def busId(self) -> str | bytes: ...


class Nvml(Protocol):
    """The part of the pynvml module that is used here; tests pass a fake."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...
    def nvmlSystemGetCudaDriverVersion(self) -> int: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...
    def nvmlDeviceGetName(self, handle: object) -> str | bytes: ...
    def nvmlDeviceGetUUID(self, handle: object) -> str | bytes: ...
    def nvmlDeviceGetPciInfo(self, handle: object) -> _Pci: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: object) -> Sequence[int]: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object) -> _Memory: ...
    def nvmlDeviceGetP2PStatus(self, first: object, second: object, index: int) -> int: ...
    def nvmlDeviceGetMigMode(self, handle: object) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int) -> object: ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG instance of a GPU. ``index`` is its number in PCI bus order, -1 for a MIG instance."""

    index: int
    name: str
    uuid: str
    pci: str
    total_bytes: int
    free_bytes: int
    handle: object
    mig: bool = False
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None: the driver does not say."""
    bytes_per_s: float = 0.0
    """How fast it reads its memory at most; 0: the driver does not say."""
    problem: str = ""
    """Why it does not answer the driver; empty if it does."""
    busy: float = 0.0
    """Share of the last second in which some process used it."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """All GPUs in PCI bus order, MIG instances after their GPU; ``problem`` is the reason why there are none."""

    gpus: tuple[Gpu, ...]
    problem: str = ""


class NvmlSession:
    """NVML between ``nvmlInit`` and ``nvmlShutdown``, as a context manager. Without library or driver: no GPUs."""

    def __init__(self, nvml: Nvml | None = None) -> None:
        self._nvml = nvml
        self._problem = ""

    def __enter__(self) -> "NvmlSession":
        if self._nvml is None:
            self._nvml = _import_nvml()
        if self._nvml is None:
            self._problem = "the Python package nvidia-ml-py is not installed"
            return self
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self._nvml, self._problem = None, f"NVML: {error}"
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()

    def inventory(self) -> Inventory:
        """List every GPU, with its ``problem`` if it does not answer. DeviceError when they cannot be counted."""
        nvml = self._nvml
        if nvml is None:
            return Inventory((), self._problem)
        try:
            gpus = [_query_or_lost(nvml, i) for i in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            raise DeviceError(f"no GPU answers the driver: {error}; see `nvidia-smi`") from error
        if not any(gpu.problem for gpu in gpus):  # the place of a lost GPU is known from the driver's order alone
            gpus.sort(key=lambda gpu: gpu.pci)
        found: list[Gpu] = []
        for index, gpu in enumerate(gpus):
            found.append(replace(gpu, index=index))
            found.extend(() if gpu.problem else _mig_instances(nvml, gpu))
        return Inventory(tuple(found), "" if found else "the driver lists no GPU")

    def driver_version(self) -> str:
        """Return the version of the driver, and the newest CUDA that it runs; empty without one."""
        if self._nvml is None:
            return ""
        try:
            version = _text(self._nvml.nvmlSystemGetDriverVersion())
            number = self._nvml.nvmlSystemGetCudaDriverVersion()
        except self._nvml.NVMLError as error:
            return f"unknown: {error}"
        return f"{version}, for CUDA up to {number // 1000}.{number % 1000 // 10}"

    def links(self, gpus: Sequence[Gpu]) -> tuple[tuple[Link, ...], ...]:
        """Return the peer-access matrix of some GPUs of the inventory."""
        return tuple(tuple(self._link(first, second) for second in gpus) for first in gpus)

    def distances(self, gpus: Sequence[Gpu]) -> tuple[tuple[int, ...], ...]:
        """Return how far up the PCI tree each two GPUs meet, in NVML's levels of 0 to 50; empty if not known."""
        ask = getattr(self._nvml, "nvmlDeviceGetTopologyCommonAncestor", None)
        if self._nvml is None or ask is None or any(gpu.mig for gpu in gpus):
            return ()
        try:
            return tuple(tuple(0 if a.uuid == b.uuid else int(ask(a.handle, b.handle)) for b in gpus) for a in gpus)
        except self._nvml.NVMLError:
            return ()

    def _link(self, first: Gpu, second: Gpu) -> Link:
        if first.uuid == second.uuid:
            return "self"
        if first.mig or second.mig or self._nvml is None:
            return "none"  # MIG instances cannot reach each other
        if self._status(first, second, _P2P_READ) and self._status(first, second, _P2P_WRITE):
            return "nvlink" if self._status(first, second, _P2P_NVLINK) else "pcie"
        return "none"

    def _status(self, first: Gpu, second: Gpu, index: int) -> bool:
        assert self._nvml is not None
        try:
            return self._nvml.nvmlDeviceGetP2PStatus(first.handle, second.handle, index) == _P2P_OK
        except self._nvml.NVMLError:  # an old driver without this query: the way through the host always works
            return False


def _import_nvml() -> Nvml | None:
    try:
        module: ModuleType = importlib.import_module("pynvml")
    except ImportError:
        return None
    return cast(Nvml, module)


def _query_or_lost(nvml: Nvml, index: int) -> Gpu:
    try:
        return _query(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError as error:
        return Gpu(index, "lost GPU", f"lost-{index}", f"lost-{index}", 0, 0, None, problem=str(error))


def _memory(nvml: Nvml, handle: object) -> tuple[int, int]:
    """Return total and free bytes; those of the machine where the driver has none of its own (unified memory)."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if "not supported" not in str(error).lower():
            raise
        import psutil  # an installation of the clients alone lacks it, and `--version -v` comes here

        machine = psutil.virtual_memory()
        return int(machine.total), int(machine.available)
    return int(memory.total), int(memory.free)


def _query(nvml: Nvml, handle: object) -> Gpu:
    total_bytes, free_bytes = _memory(nvml, handle)
    return Gpu(
        index=-1,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        pci=_text(nvml.nvmlDeviceGetPciInfo(handle).busId).upper(),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        handle=handle,
        capability=_capability(nvml, handle),
        bytes_per_s=_bytes_per_s(nvml, handle),
        busy=_busy(nvml, handle),
    )


def _busy(nvml: Nvml, handle: object) -> float:
    """Return how much of the last second the GPU worked; 0 where driver or package do not tell."""
    ask = getattr(nvml, "nvmlDeviceGetUtilizationRates", None)
    try:
        return 0.0 if ask is None else float(ask(handle).gpu) / 100
    except nvml.NVMLError:
        return 0.0


def _bytes_per_s(nvml: Nvml, handle: object) -> float:
    """Return the memory clock times the width of the bus, twice per beat; 0 where driver or package do not tell."""
    ask_clock, ask_width = (
        getattr(nvml, name, None) for name in ("nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetMemoryBusWidth")
    )
    if ask_clock is None or ask_width is None:
        return 0.0
    try:
        return 2e6 * float(ask_clock(handle, _MEMORY_CLOCK)) * float(ask_width(handle)) / 8
    except nvml.NVMLError:
        return 0.0


def _capability(nvml: Nvml, handle: object) -> tuple[int, int] | None:
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError:
        return None
    return int(major), int(minor)


def _mig_instances(nvml: Nvml, parent: Gpu) -> list[Gpu]:
    """List the MIG instances of a GPU; none where MIG is off or unknown."""
    instances = []
    try:
        if not nvml.nvmlDeviceGetMigMode(parent.handle)[0]:
            return []
        for slot in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent.handle)):
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent.handle, slot)
            except nvml.NVMLError:  # an empty slot
                continue
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name, uuid = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle))
            size = int(memory.total), int(memory.free)
            instances.append(Gpu(-1, name, uuid, parent.pci, *size, handle, True, parent.capability))
    except nvml.NVMLError:  # consumer cards answer "not supported"
        return []
    return instances


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
