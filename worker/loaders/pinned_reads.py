"""Read bytes of files into pinned memory, from where a GPU copies them while the thread goes on.

A copy from other memory makes the thread wait, since the driver moves such bytes through a pinned buffer of its own.
Fresh memory for each read costs as much as the read, because the system clears its pages first.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.worker.loaders.slices import FileRows

_LEAST_BYTES = 8 << 20


@dataclass(slots=True)
class _Buffer:
    memory: Tensor
    sent: torch.cuda.Event | None
    """Happens once what was read last has been copied; None on a CPU, where a copy is done at once."""

    def wait(self) -> None:
        if self.sent is not None:
            self.sent.synchronize()


class PinnedReads:
    """Two buffers for each thread: it reads into one while the other is copied. In tests on a CPU: plain memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()

    def read(self, source: FileRows) -> Tensor:
        """Return the bytes on the device, uint8 [nbytes], for use on the current stream. CheckpointError."""
        buffer = self._next(source.nbytes)
        raw = buffer.memory[: source.nbytes]
        source.read(raw.numpy().data)
        on_device = raw.to(self._device, non_blocking=True, copy=True)
        if buffer.sent is not None:
            buffer.sent.record(torch.cuda.current_stream(self._device))
        return on_device

    def _next(self, nbytes: int) -> _Buffer:
        """Return the buffer of this thread that was used longest ago, large enough, once it may be overwritten."""
        buffers: list[_Buffer] = self._own.__dict__.setdefault("buffers", [])
        buffer = buffers.pop(0) if len(buffers) == 2 else None
        if buffer is not None:
            buffer.wait()
        if buffer is None or len(buffer.memory) < nbytes:
            is_cuda = self._device.type == "cuda"
            memory = torch.empty(max(nbytes, _LEAST_BYTES), dtype=torch.uint8, pin_memory=is_cuda)
            buffer = _Buffer(memory, torch.cuda.Event(blocking=True) if is_cuda else None)  # type: ignore[no-untyped-call]
        buffers.append(buffer)
        return buffer
