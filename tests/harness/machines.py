"""Models and machines to plan on, and a driver that answers like NVML."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.specs import make_facts
from mgpu.orchestrator.placement.machine.devices import DeviceInfo, Machine
from mgpu.orchestrator.placement.machine.nvml import Link

GIB = 1 << 30


QWEN3_32B = make_facts()
SMOLLM2 = make_facts(q=9, kv=3, layers=30, hidden=576, width=1536, head_dim=64, vocab=49152, context=8192, tied=True)
TINY = make_facts(q=4, kv=2, layers=8, hidden=64, width=128, head_dim=16, vocab=100, context=256)


def gpus(
    *free_gib: float, nccl: bool = True, link: Link = "nvlink", selectors: Sequence[str] = (), total_gib: float = 0
) -> Machine:
    """Return a machine whose GPUs have this much free memory, which is all of it unless ``total_gib`` is given."""
    count = len(free_gib)
    devices = tuple(
        DeviceInfo(
            ordinal=i,
            kind="cuda",
            name="Test GPU",
            total_bytes=int((total_gib or free) * GIB),
            free_bytes=int(free * GIB),
            uuid=f"GPU-{i:04}",
            selector=selectors[i] if selectors else str(i),
        )
        for i, free in enumerate(free_gib)
    )
    links: tuple[tuple[Link, ...], ...] = tuple(
        tuple("self" if a == b else link for b in range(count)) for a in range(count)
    )
    return Machine(devices, links, "" if nccl else "MGPU_NO_NCCL=1")


def cpus(count: int, gib_each: float = 8, shared_memory: bool = True) -> Machine:
    size = int(gib_each * GIB)
    devices = tuple(DeviceInfo(i, "cpu", f"CPU worker {i}", size, size) for i in range(count))
    links: tuple[tuple[Link, ...], ...] = tuple(
        tuple("self" if a == b else "none" for b in range(count)) for a in range(count)
    )
    return Machine(devices, links, "NCCL needs GPUs", shared_memory)


class FakeNvmlError(Exception):
    pass


@dataclass
class FakeMemory:
    total: int
    free: int


@dataclass
class FakePci:
    busId: str


@dataclass
class FakeGpu:
    uuid: str
    bus: str
    name: str = "Test GPU"
    memory: FakeMemory = field(default_factory=lambda: FakeMemory(80 * GIB, 79 * GIB))
    mig: "list[FakeGpu] | None" = None
    """Instances when MIG is on."""
    lost: bool = False
    capability: tuple[int, int] | None = (9, 0)
    clock_mhz: int | None = 3201
    """Of the memory; None: the driver does not say."""
    bus_bits: int = 6144


class FakeNvml:
    """The part of pynvml that mgpu uses. ``p2p`` maps (uuid, uuid, question) to a status; 0 is yes."""

    NVMLError = FakeNvmlError

    def __init__(
        self, devices: Sequence[FakeGpu], init_error: str = "", p2p: dict[tuple[str, str, int], int] | None = None
    ):
        self.devices = devices
        self.init_error = init_error
        self.p2p = p2p or {}
        self.open_sessions = 0

    def nvmlInit(self) -> None:
        if self.init_error:
            raise FakeNvmlError(self.init_error)
        self.open_sessions += 1

    def nvmlShutdown(self) -> None:
        self.open_sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return b"580.95.05"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if self.devices[index].lost:
            raise FakeNvmlError("GPU is lost")
        return self.devices[index]

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str | bytes:
        return handle.name.encode()  # older releases of the package answer in bytes

    def nvmlDeviceGetUUID(self, handle: FakeGpu) -> str | bytes:
        return handle.uuid

    def nvmlDeviceGetPciInfo(self, handle: FakeGpu) -> FakePci:
        return FakePci(handle.bus)

    def nvmlDeviceGetCudaComputeCapability(self, handle: FakeGpu) -> tuple[int, int]:
        if handle.capability is None:
            raise FakeNvmlError("Not Supported")
        return handle.capability

    def nvmlDeviceGetMaxClockInfo(self, handle: FakeGpu, kind: int) -> int:
        if handle.clock_mhz is None:
            raise FakeNvmlError("Not Supported")
        assert kind == 2  # NVML_CLOCK_MEM
        return handle.clock_mhz

    def nvmlDeviceGetMemoryBusWidth(self, handle: FakeGpu) -> int:
        return handle.bus_bits

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu) -> FakeMemory:
        return handle.memory

    def nvmlDeviceGetP2PStatus(self, first: FakeGpu, second: FakeGpu, index: int) -> int:
        return self.p2p.get((first.uuid, second.uuid, index), 0)

    def nvmlDeviceGetMigMode(self, handle: FakeGpu) -> list[int]:
        if handle.mig is None:
            raise FakeNvmlError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: FakeGpu) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: FakeGpu, index: int) -> FakeGpu:
        if handle.mig is None or index >= len(handle.mig):
            raise FakeNvmlError("Not Found")
        return handle.mig[index]
