"""Pass tensors to one other process of the same machine, through a ring of slots in shared host memory.

On CUDA the slots are pinned, so that both copies run at the speed of the bus: this is the way between GPUs that cannot
reach each other's memory. A ring has several slots, so the sender goes on before its message is read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mgpu.protocol.model.shared_memory_layout import ChannelRegion
from mgpu.worker.ranks.shared_memory import WORD, SharedSegment


class RingChannel:
    """One end of a ring. Message n lies in slot n % depth; sender and receiver count in the shared file.

    Subclasses say where the slots are.
    """

    _received_base = 0
    """The receiver's counter before the first message."""

    def __init__(self, segment: SharedSegment, region: ChannelRegion, device: torch.device, peer: str) -> None:
        self._segment = segment
        self._region = region
        self._device = device
        self._peer = peer
        self._spin_s = 0.002 if device.type == "cuda" else 0.0  # on a CPU the peer may need this very core
        self._count = 0
        self._slots = torch.empty(0, dtype=torch.uint8)

    def send(self, x: Tensor) -> None:
        x = x.contiguous()
        free = self._count + 1 - self._region.depth
        self._wait(self._region.received, self._received_base + free, "to read")
        self._slot(x.numel(), x.dtype).copy_(x.view(-1), non_blocking=True)
        self._publish(self._region.sent, 0)

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._wait(self._region.sent, self._count + 1, "to send")
        out = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        out.view(-1).copy_(self._slot(out.numel(), dtype), non_blocking=True)
        self._publish(self._region.received, self._received_base)
        return out

    def _slot(self, count: int, dtype: torch.dtype) -> Tensor:
        nbytes, slot_bytes = count * dtype.itemsize, self._region.slot_bytes
        if nbytes > slot_bytes:
            raise ValueError(f"message of {nbytes} bytes in a slot of {slot_bytes}")
        start = self._count % self._region.depth * slot_bytes
        return self._slots[start : start + nbytes].view(dtype)

    def _wait(self, counter: int, target: int, what: str) -> None:
        self._segment.wait(counter // WORD, target, f"{self._peer} {what}", self._spin_s)

    def _publish(self, counter: int, base: int) -> None:
        """Count one message more, but not before its copy has ended."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._count += 1
        self._segment.words[counter // WORD] = base + self._count


class HostChannel(RingChannel):
    """`Channel` whose slots are in the shared file."""

    def __init__(self, segment: SharedSegment, region: ChannelRegion, device: torch.device, peer: str) -> None:
        super().__init__(segment, region, device, peer)
        self._slots = segment.view(region.slots, region.depth * region.slot_bytes, torch.uint8)
        if device.type == "cuda":
            pin(self._slots)


def pin(memory: Tensor) -> None:
    """Register pages with CUDA. RuntimeError with CUDA's reason when it refuses."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[no-untyped-call]
    torch.cuda.check_error(code)
