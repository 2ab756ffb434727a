"""Let another process of this machine map memory of a GPU (CUDA IPC); handles are MessagePack.

The calls are the driver's own. torch's sharing of storages counts references in files of /dev/shm, which stay there
when all processes are killed at once. What the driver itself keeps there is removed by the server: see
orchestrator/host/driver_files.py.
"""

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import msgpack
import torch
from torch import Tensor

_DRIVER = "libcuda.so.1"
_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """What the driver needs in another process: `CUipcMemHandle`, passed by value."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


@dataclass(frozen=True, slots=True)
class MappedMemory:
    """Another process's memory as this one sees it, until `unmap`."""

    memory: Tensor
    """uint8, on the device that it was mapped for."""
    base: int
    """Where the whole allocation begins, of which the memory is a part."""

    def unmap(self) -> None:
        """Unmap it. Nothing may use the memory any more. On a device that has failed it ends with this process."""
        with suppress(RuntimeError), torch.cuda.device(self.memory.device):
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(self.base))


def export(memory: Tensor) -> bytes:
    """Return what `map_exported` needs. The tensor must live for as long as any process maps it."""
    torch.cuda.synchronize(memory.device)
    address = memory.data_ptr()
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    with torch.cuda.device(memory.device):
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    packed: bytes = msgpack.packb([bytes(handle), address - base.value, memory.nbytes])
    return packed


def map_exported(handle: bytes, device: torch.device) -> MappedMemory:
    """Map another process's memory for ``device``, this rank's own; the driver enables peer access.

    Bytes after the handle are ignored. RuntimeError where the driver refuses.
    """
    unpacker = msgpack.Unpacker()
    unpacker.feed(handle)
    driver_handle, offset, nbytes = unpacker.unpack()
    base = ctypes.c_uint64()
    with torch.cuda.device(device):
        opened = _Handle.from_buffer_copy(driver_handle)
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(base), opened, ctypes.c_uint(_ENABLE_PEER_ACCESS))
    storage = torch._C._construct_storage_from_data_pointer(base.value + offset, device, nbytes)
    return MappedMemory(torch.empty(0, dtype=torch.uint8, device=device).set_(storage), base.value)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL(_DRIVER)


def _call(name: str, *arguments: object) -> None:
    """Call the driver; RuntimeError with the error's name if it refuses."""
    if code := getattr(_driver(), name)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'error %d' % code).decode()}")
