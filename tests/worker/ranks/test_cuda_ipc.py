"""CUDA IPC by the driver's own calls, with an imitated driver: a handle is an allocation's address."""

import ctypes
import os
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from mgpu.worker.ranks import cuda_ipc
from mgpu.worker.ranks.cuda_ipc import export, map_exported

CPU = torch.device("cpu")


class Driver:
    """The five calls, for host memory of this process."""

    def __init__(self, allocation: torch.Tensor) -> None:
        self.base, self.size = allocation.data_ptr(), allocation.nbytes
        self.refused = ""
        self.closed: list[int] = []

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: ctypes.c_uint64) -> int:
        assert self.base <= address.value < self.base + self.size
        base._obj.value, size._obj.value = self.base, self.size
        return 0

    def cuIpcGetMemHandle(self, handle: Any, base: ctypes.c_uint64) -> int:
        ctypes.memmove(handle, struct.pack("<Q56x", base.value), 64)
        return 0

    def cuIpcOpenMemHandle_v2(self, base: Any, handle: ctypes.Structure, flags: ctypes.c_uint) -> int:
        assert flags.value == 1
        base._obj.value = struct.unpack_from("<Q", bytes(handle))[0]
        return 217 if self.refused else 0

    def cuIpcCloseMemHandle(self, base: ctypes.c_uint64) -> int:
        self.closed.append(base.value)
        return 0

    def cuGetErrorName(self, code: int, text: Any) -> int:
        text._obj.value = self.refused.encode() or None
        return 0


@pytest.fixture
def allocation() -> torch.Tensor:
    return torch.zeros(1024, dtype=torch.uint8)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, allocation: torch.Tensor) -> Driver:
    imitated = Driver(allocation)
    monkeypatch.setattr(cuda_ipc, "_driver", lambda: imitated)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return imitated


def test_a_part_of_an_allocation_is_mapped_where_it_lies(driver: Driver, allocation: torch.Tensor) -> None:
    handle = export(allocation[256:768])
    mapped = map_exported(handle + bytes(50), CPU)
    assert (mapped.memory.dtype, mapped.memory.numel()) == (torch.uint8, 512)
    mapped.memory[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert allocation[254:262].tolist() == [0, 0, 1, 2, 3, 4, 0, 0]
    mapped.unmap()
    assert driver.closed == [allocation.data_ptr()]


@pytest.mark.parametrize(("name", "text"), [("CUDA_ERROR_PEER", "CUDA_ERROR_PEER"), ("", "")])
def test_a_refusal_names_the_call_and_the_error(driver: Driver, allocation: torch.Tensor, name: str, text: str) -> None:
    handle = export(allocation)
    driver.refused = name
    if not name:
        driver.cuIpcOpenMemHandle_v2 = lambda *_: 999  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=f"cuIpcOpenMemHandle_v2: {text or 'error 999'}"):
        map_exported(handle, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sharing_leaves_no_file_of_torch() -> None:
    export(torch.zeros(1 << 20, dtype=torch.uint8, device="cuda"))
    assert not [each.name for each in Path("/dev/shm").glob(f"torch_{os.getpid()}_*")]
