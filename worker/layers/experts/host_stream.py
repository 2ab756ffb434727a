"""Computations of the CPU as part of a CUDA stream, between copies to pinned memory and back.

The driver calls the kernel in a thread of its own when the stream gets there. In a CUDA graph the copies and the call
are nodes with fixed addresses. So buffers and jobs that a capture has seen stay as they are until the worker ends. The
layers of a stage share buffers: they are computed one after the other on one stream.
"""

# T tokens, D model dim, A active experts of a token

import ctypes
from functools import cache

import torch
from torch import Tensor

from mgpu.worker.kernels.cpu.experts import ExpertsKernel, Job, Rows, kernel_address, room_bytes


class HostStream:
    """Buffers and jobs of one stage on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._jobs: dict[tuple[int, int], tuple[Job, Rows]] = {}
        self._kept: list[object] = []
        """What work in flight, or a graph, may still use."""

    def compute(self, kernel: ExpertsKernel, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Return the sums over each token's experts; all of it is work of the current stream."""
        x_TD, ids_TA = x_TD.contiguous(), ids_TA.to(torch.int32).contiguous()
        weights_TA = weights_TA.float().contiguous()
        out_TD = torch.empty_like(x_TD)
        job, rows = self._job(kernel, x_TD, ids_TA)
        stream = _stream_of(self._device)
        for on_cpu, on_gpu in ((rows.x_TD, x_TD), (rows.ids_TA, ids_TA), (rows.weights_TA, weights_TA)):
            _call("cuMemcpyDtoHAsync_v2", on_cpu.data_ptr(), on_gpu.data_ptr(), on_gpu.nbytes, stream)
        _call("cuLaunchHostFunc", stream, kernel_address(), ctypes.addressof(job))
        _call("cuMemcpyHtoDAsync_v2", out_TD.data_ptr(), rows.out_TD.data_ptr(), out_TD.nbytes, stream)
        return out_TD

    def _job(self, kernel: ExpertsKernel, x_TD: Tensor, ids_TA: Tensor) -> tuple[Job, Rows]:
        """Return the job of a layer for so many tokens, and the pinned memory that it reads and writes."""
        (tokens, active), key = ids_TA.shape, (id(kernel), len(x_TD))
        if (found := self._jobs.get(key)) is not None:
            return found
        rows = Rows(
            self._buffer("x", x_TD.shape, x_TD.dtype), self._buffer("ids", (tokens, active), torch.int32),
            self._buffer("weights", (tokens, active), torch.float32), self._buffer("out", x_TD.shape, x_TD.dtype),
        )  # fmt: skip
        job = kernel.job(rows, torch.get_num_threads())
        job.room = self._buffer("room", (room_bytes(job),), torch.uint8).data_ptr()
        self._kept.append(kernel)
        self._jobs[key] = job, rows
        return job, rows

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a part of a buffer. One that is too small is replaced, and kept for those that have its address.

        The largest step is run before any other, to measure memory, so buffers have their final size before a capture.
        """
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda" and name != "room")
            self._kept.append(buffer)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    driver.cuMemcpyDtoHAsync_v2.argtypes = [pointer, pointer, size, pointer]
    driver.cuMemcpyHtoDAsync_v2.argtypes = [pointer, pointer, size, pointer]
    driver.cuLaunchHostFunc.argtypes = [pointer, pointer, pointer]
    return driver


def _call(name: str, *arguments: int) -> None:
    """Call a function of the driver. RuntimeError if it refuses."""
    if code := getattr(_driver(), name)(*arguments):
        raise RuntimeError(f"{name} failed with CUDA error {code}")
