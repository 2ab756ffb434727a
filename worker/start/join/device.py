"""Say which device this rank has on its host, and how much memory, without torch: the orchestrator plans with it."""

import ctypes
import os

from mgpu.protocol.internal.host_messages import RankDevice
from mgpu.worker.probes.cuda_driver import Driver, DriverError

_MAJOR, _MINOR = 75, 76
"""Numbers of the driver's attributes for the compute capability."""


class NoDevice(Exception):
    """The device that was asked for is not here; the text says what to type instead."""


def find_device(choice: str, local_rank: int, local_world_size: int) -> tuple[RankDevice, str]:
    """Return the device of a rank, and its name for a spec: ``cpu`` or ``cuda:N``. NoDevice.

    ``choice`` is cuda, cpu, or auto: a GPU if there are any.
    """
    if choice != "cpu":
        try:
            return _gpu(local_rank)
        except DriverError as error:
            if choice == "cuda":
                raise NoDevice(f"--device cuda: no GPU can be used here ({error}); --device cpu runs without") from None
    total, free = _memory()
    return RankDevice("cpu", "CPU", total // local_world_size, free // local_world_size), "cpu"


def _gpu(local_rank: int) -> tuple[RankDevice, str]:
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # read by the driver at its start, and by the worker
    driver = Driver()
    count = driver.value("cuDeviceGetCount", ctypes.c_int).value
    if not count:
        raise DriverError("CUDA_VISIBLE_DEVICES hides all of them")
    if local_rank >= count > 1:
        raise NoDevice(
            f"LOCAL_RANK={local_rank}, and {count} GPUs are visible here: start {count} processes a host "
            f"(--nproc-per-node {count}), or make more GPUs visible"
        )
    ordinal = local_rank if local_rank < count else 0  # srun and pods may show each process its own GPU alone
    handle = driver.value("cuDeviceGet", ctypes.c_int, ordinal).value
    name = ctypes.create_string_buffer(256)
    driver.call("cuDeviceGetName", name, 256, handle)
    total = driver.value("cuDeviceTotalMem_v2", ctypes.c_uint64, handle).value
    raw = ctypes.create_string_buffer(16)
    driver.call("cuDeviceGetUuid", raw, handle)
    capability = tuple(
        driver.value("cuDeviceGetAttribute", ctypes.c_int, number, handle).value for number in (_MAJOR, _MINOR)
    )
    # Free memory needs a context, which takes memory itself. Workers measure it after loading.
    text = name.value.decode(errors="replace")
    return RankDevice("cuda", text, total, total, raw.raw.hex(), capability), f"cuda:{ordinal}"


def _memory() -> tuple[int, int]:
    """Return total and available bytes of this host's memory."""
    sizes = {}
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) * 1024
    return sizes["MemTotal"], sizes["MemAvailable"]
