"""Pass activations to a GPU whose memory this one can reach (CUDA IPC), without a copy in host memory.

The receiver owns the ring of slots, on its device, and publishes an IPC handle in the shared file. The sender maps the
ring at its first message, until its process ends, and copies straight into it. Only the counters are in host memory.
The receiver's counter begins at 1, which tells the sender that the handle is there.
"""

import torch
from torch import Tensor

from mgpu.protocol.model.shared_memory_layout import HANDLE_BYTES, ChannelRegion
from mgpu.worker.ranks.cuda_ipc import export, map_exported
from mgpu.worker.ranks.host_channel import RingChannel
from mgpu.worker.ranks.shared_memory import WORD, SharedSegment


class GpuSender(RingChannel):
    """Sending end of a `Channel`."""

    _received_base = 1

    def send(self, x: Tensor) -> None:
        if not len(self._slots):
            self._wait(self._region.received, self._received_base, "to open its channel")
            handle = self._segment.view(self._region.handle, HANDLE_BYTES, torch.uint8)
            self._slots = map_exported(bytes(handle.tolist()), self._device).memory
        super().send(x)


class GpuReceiver(RingChannel):
    """Receiving end of a `Channel`; it owns the ring for as long as it lives."""

    _received_base = 1

    def __init__(self, segment: SharedSegment, region: ChannelRegion, device: torch.device, peer: str) -> None:
        super().__init__(segment, region, device, peer)
        self._slots = torch.empty(region.depth * region.slot_bytes, dtype=torch.uint8, device=device)
        packed = export(self._slots)
        if len(packed) > HANDLE_BYTES:
            raise RuntimeError(f"CUDA IPC handle of {len(packed)} bytes; at most {HANDLE_BYTES} fit")
        handle = segment.view(region.handle, HANDLE_BYTES, torch.uint8)
        handle[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        segment.words[region.received // WORD] = self._received_base
