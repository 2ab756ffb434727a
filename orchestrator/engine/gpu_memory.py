"""Ask the driver, beside the engine, how full the server's GPUs are."""

import threading
import time
from collections.abc import Mapping

from mgpu.orchestrator.errors import DeviceError
from mgpu.orchestrator.placement.machine.nvml import Nvml, NvmlSession

FRESH_S = 1.0
"""Readings are made again when somebody asks for older ones."""


class GpuMemory:
    """The memory of some GPUs. A driver that hangs delays no step: a thread of its own asks it, when asked itself."""

    def __init__(self, uuids: Mapping[int, str], nvml: Nvml | None = None) -> None:
        """``uuids``: by ordinal. Without any, nothing is ever asked."""
        self._ordinals = {uuid: ordinal for ordinal, uuid in uuids.items()}
        self._nvml = nvml
        self._counters: dict[str, float] = {}
        self._read_s = -FRESH_S
        self._reader: threading.Thread | None = None

    def counters(self) -> dict[str, float]:
        """Return the last readings at once, under the names that clients see, and begin a new one if they are old."""
        reads = self._reader is not None and self._reader.is_alive()
        if self._ordinals and not reads and time.monotonic() - self._read_s >= FRESH_S:
            self._reader = threading.Thread(target=self._read, name="gpu-memory", daemon=True)
            self._reader.start()
        return self._counters

    def _read(self) -> None:
        counters: dict[str, float] = {}
        try:
            with NvmlSession(self._nvml) as session:
                gpus = session.inventory().gpus
        except DeviceError:  # the workers will find out; the answer has no readings then
            gpus = ()
        for gpu in gpus:
            if (ordinal := self._ordinals.get(gpu.uuid)) is not None and not gpu.problem:
                counters[f"gpu{ordinal}_memory_used_bytes"] = float(gpu.total_bytes - gpu.free_bytes)
                counters[f"gpu{ordinal}_memory_total_bytes"] = float(gpu.total_bytes)
        self._counters, self._read_s = counters, time.monotonic()
