"""Hand activations from one GPU to another that can reach its memory (CUDA IPC), without passing through the host.

The receiver owns a ring of slots on its device and publishes the IPC handle in the shared file; the sender maps it and
copies straight into it. Only the counters are in host memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mgpu.protocol.model.shared_memory_layout import HANDLE_BYTES, ChannelRegion
from mgpu.worker.ranks.cuda_ipc import export, map_exported
from mgpu.worker.ranks.shared_memory import SharedSegment

_WORD = 8
_SPIN_S = 0.002


class _GpuEnd:
    """What both ends share: the ring of slots in the receiver's memory and the counters in the shared file."""

    def __init__(self, segment: SharedSegment, region: ChannelRegion, device: torch.device, peer: str) -> None:
        self._segment = segment
        self._region = region
        self._device = device
        self._peer = peer
        self._count = 0
        self._ring: Tensor | None = None

    def _slot(self, ring: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        start = self._count % self._region.depth * self._region.slot_bytes
        return ring[start : start + count * dtype.itemsize].view(dtype)

    def _wait(self, counter: int, target: int, what: str) -> None:
        self._segment.wait(counter // _WORD, target, f"{self._peer} {what}", _SPIN_S)

    def _publish(self, counter: int, count: int) -> None:
        torch.cuda.current_stream(self._device).synchronize()
        self._count = count
        self._segment.words[counter // _WORD] = count

    @property
    def _handle(self) -> Tensor:
        return self._segment.view(self._region.handle, HANDLE_BYTES, torch.uint8)


class GpuSender(_GpuEnd):
    """Sending end of a `Channel`. It maps the receiver's ring at the first message."""

    def send(self, x: Tensor) -> None:
        if self._ring is None:
            # A receiver's counter is offset by one: 1 says that its handle is there.
            self._wait(self._region.received, 1, "to open its channel")
            self._ring = map_exported(bytes(self._handle.tolist()), self._device)
        self._wait(self._region.received, self._count + 2 - self._region.depth, "to read")
        x = x.contiguous()
        self._slot(self._ring, x.numel(), x.dtype).copy_(x.view(-1), non_blocking=True)
        self._publish(self._region.sent, self._count + 1)

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        raise NotImplementedError("this is the sending end")


class GpuReceiver(_GpuEnd):
    """Receiving end of a `Channel`; it owns the ring for as long as it lives."""

    def __init__(self, segment: SharedSegment, region: ChannelRegion, device: torch.device, peer: str) -> None:
        super().__init__(segment, region, device, peer)
        self._ring = torch.empty(region.depth * region.slot_bytes, dtype=torch.uint8, device=device)
        packed = export(self._ring)
        if len(packed) > HANDLE_BYTES:
            raise RuntimeError(f"CUDA IPC handle of {len(packed)} bytes; at most {HANDLE_BYTES} fit")
        self._handle[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        segment.words[region.received // _WORD] = 1

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        assert self._ring is not None
        self._wait(self._region.sent, self._count + 1, "to send")
        out = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        out.view(-1).copy_(self._slot(self._ring, out.numel(), dtype), non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        self._count += 1
        self._segment.words[self._region.received // _WORD] = self._count + 1
        return out

    def send(self, x: Tensor) -> None:
        raise NotImplementedError("this is the receiving end")
