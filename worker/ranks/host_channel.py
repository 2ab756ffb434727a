"""Hand tensors from one process to one other process of the same machine, through shared host memory.

On CUDA the slots are pinned, so that both copies run at the speed of the bus; this is the way between GPUs that cannot
reach each other's memory. A message waits in one of a few slots, so the sender goes on before it is read.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mgpu.protocol.model.shared_memory_layout import ChannelRegion
from mgpu.worker.ranks.shared_memory import SharedSegment

_WORD = 8


class Channel(Protocol):
    """One direction between two ranks; messages arrive in order and the receiver knows their shapes."""

    def send(self, x: Tensor) -> None:
        """Pass ``x`` on; it may be overwritten afterwards."""
        ...

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Wait for the next message, as a new tensor on this rank's device."""
        ...


class HostChannel:
    """`Channel` through host memory; each rank uses only one of its ends."""

    def __init__(self, segment: SharedSegment, region: ChannelRegion, device: torch.device, peer: str) -> None:
        self._segment = segment
        self._region = region
        self._device = device
        self._peer = peer
        self._spin_s = 0.002 if device.type == "cuda" else 0.0  # on CPU the peer may need this very core
        self._count = 0
        if device.type == "cuda":
            _pin(segment.view(region.slots, region.depth * region.slot_bytes, torch.uint8))

    def send(self, x: Tensor) -> None:
        x = x.contiguous()
        self._wait(self._region.received, self._count + 1 - self._region.depth, f"{self._peer} to read")
        self._slot(x.numel(), x.dtype).copy_(x.view(-1), non_blocking=True)
        self._drain()
        self._count += 1
        self._segment.words[self._region.sent // _WORD] = self._count

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._wait(self._region.sent, self._count + 1, f"{self._peer} to send")
        out = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        out.view(-1).copy_(self._slot(out.numel(), dtype), non_blocking=True)
        self._drain()
        self._count += 1
        self._segment.words[self._region.received // _WORD] = self._count
        return out

    def _slot(self, count: int, dtype: torch.dtype) -> Tensor:
        if count * dtype.itemsize > self._region.slot_bytes:
            raise ValueError(f"message of {count * dtype.itemsize} bytes in a slot of {self._region.slot_bytes}")
        index = self._count % self._region.depth
        return self._segment.view(self._region.slots + index * self._region.slot_bytes, count, dtype)

    def _wait(self, counter: int, target: int, what: str) -> None:
        self._segment.wait(counter // _WORD, target, what, self._spin_s)

    def _drain(self) -> None:
        """Let the copy end before a counter says so."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _pin(memory: Tensor) -> None:
    """Register pages with CUDA. RuntimeError with CUDA's reason when it refuses."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[no-untyped-call]
    torch.cuda.check_error(code)
