"""Let another process of this machine map memory of a GPU (CUDA IPC); handles are MessagePack."""

import msgpack
import torch
from torch import Tensor


def export(memory: Tensor) -> bytes:
    """Return what `map_exported` needs. The tensor must live for as long as any process maps it."""
    torch.cuda.synchronize(memory.device)
    packed: bytes = msgpack.packb(list(memory.untyped_storage()._share_cuda_()))  # type: ignore[no-untyped-call]
    return packed


def map_exported(handle: bytes, device: torch.device) -> Tensor:
    """Map another process's memory as bytes on ``device``, this rank's own; the driver enables peer access.

    Bytes after the handle are ignored. RuntimeError where the driver refuses.
    """
    unpacker = msgpack.Unpacker()
    unpacker.feed(handle)
    _, *rest = unpacker.unpack()
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *rest)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
