"""All experts of a layer by one call of a kernel for the CPU, in bfloat16: `experts.c`.

The call needs neither Python nor torch, so a stream of CUDA can make it, and so can a CUDA graph.
"""

# T tokens, D model dim, A active experts of a token, N experts, O outputs and I inputs of a matrix

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.expert_facts import Clamp
from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.cpu.library import library
from mgpu.worker.kernels.cpu.tiles import TiledWeight

log = logging.getLogger(__name__)

_DENSE_BITS = 16
_CLAMPED = 2
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}


class _Stack(ctypes.Structure):
    """As `Stack` in experts.c."""

    _fields_ = (
        ("matrices", ctypes.c_void_p), ("biases", ctypes.c_void_p), ("table", ctypes.c_void_p),
        ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64), ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32), ("zero", ctypes.c_int32), ("has_offsets", ctypes.c_int32),
    )  # fmt: skip


class Job(ctypes.Structure):
    """As `Job` in experts.c: one computation, with the addresses of all that it reads and writes."""

    _fields_ = (
        ("gate_up", _Stack), ("down", _Stack), ("x", ctypes.c_void_p), ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p), ("out", ctypes.c_void_p), ("room", ctypes.c_void_p), ("tokens", ctypes.c_int64),
        ("active", ctypes.c_int64), ("first_expert", ctypes.c_int64), ("experts", ctypes.c_int64),
        ("alpha", ctypes.c_float), ("limit", ctypes.c_float), ("activation", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )  # fmt: skip


class ExpertMatrix:
    """The matrices of all experts, which it keeps alive: dense [N, O, I], or one in tiles for each expert."""

    def __init__(self, held: Tensor | Sequence[TiledWeight], bias_NO: Tensor | None) -> None:
        matrices = [*held] if isinstance(held, Tensor) else [each.tiles for each in held]
        self._kept = matrices, bias_NO
        self._addresses = torch.tensor([each.data_ptr() for each in matrices], dtype=torch.int64)
        stack = _Stack(self._addresses.data_ptr(), None if bias_NO is None else bias_NO.data_ptr())
        if isinstance(held, Tensor):
            _, stack.outputs, stack.inputs = held.shape
            stack.group, stack.bits = stack.inputs, _DENSE_BITS
        else:
            first = held[0]
            stack.outputs, stack.inputs, stack.group = first.outputs, first.inputs, first.group
            stack.bits, stack.zero, stack.has_offsets = first.bits, first.zero, first.has_offsets
            stack.table = None if first.table is None else first.table.data_ptr()
            self._first = first
        self.stack = stack
        self.count = len(matrices)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a call reads and writes, on the CPU: x and out [T, D] bfloat16, ids [T, A] int32, weights [T, A] float32."""

    x_TD: Tensor
    ids_TA: Tensor
    weights_TA: Tensor
    out_TD: Tensor


class ExpertsKernel:
    """The experts of a layer that a rank holds, as the kernel takes them."""

    def __init__(
        self, gate_up: ExpertMatrix, down: ExpertMatrix, first_expert: int, activation: Activation, clamp: Clamp | None
    ) -> None:
        self._gate_up, self._down = gate_up, down
        self._first_expert = first_expert
        self._activation = _ACTIVATIONS[activation] if clamp is None else _CLAMPED
        self._clamp = clamp or Clamp(0.0, 0.0)

    def job(self, rows: Rows, threads: int) -> Job:
        """Return the computation for some rows. It needs ``room`` of `room_bytes`, and all of it must stay alive."""
        tokens, active = rows.ids_TA.shape
        return Job(
            self._gate_up.stack, self._down.stack, rows.x_TD.data_ptr(), rows.ids_TA.data_ptr(),
            rows.weights_TA.data_ptr(), rows.out_TD.data_ptr(), None, tokens, active, self._first_expert,
            self._gate_up.count, self._clamp.alpha, self._clamp.limit, self._activation, threads,
        )  # fmt: skip

    def __call__(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """Return the weighted sum over each token's experts that this rank holds, [T, D]."""
        ids_TA, weights_TA = ids_TA.to(torch.int32).contiguous(), weights_TA.float().contiguous()
        rows = Rows(x_TD.contiguous(), ids_TA, weights_TA, torch.empty_like(x_TD))
        job = self.job(rows, torch.get_num_threads())
        room = torch.empty(room_bytes(job), dtype=torch.uint8)
        job.room = room.data_ptr()
        _kernels().mgpu_experts(ctypes.byref(job))
        return rows.out_TD


def room_bytes(job: Job) -> int:
    """Return the bytes of memory that a job needs beside its rows."""
    return int(_kernels().mgpu_experts_room(ctypes.byref(job)))


def kernel_address() -> int:
    """Return the address of the function that computes a job, whose address is its only argument."""
    return ctypes.cast(_kernels().mgpu_experts, ctypes.c_void_p).value or 0


@cache
def has_kernels() -> bool:
    """Try the kernel once; False without a compiler, or if it differs from plain torch."""
    if library() is None:
        return False
    drawn = torch.randn(3, 96, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gate_up, down = drawn, drawn[:, :64, :48].contiguous()
    x, ids, weights = drawn[0, :5], torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]]), torch.full((5, 2), 0.5)
    expected = torch.zeros(5, 64)
    for token, expert in zip([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], ids.flatten().tolist(), strict=True):
        gate, up = F.linear(x[token].float(), gate_up[expert].float()).chunk(2)
        expected[token] += 0.5 * F.linear(F.silu(gate) * up, down[expert].float())
    kernel = ExpertsKernel(ExpertMatrix(gate_up, None), ExpertMatrix(down, None), 0, "silu", None)
    if bool((kernel(x, ids, weights).float() - expected).abs().max() <= 0.02 * expected.abs().max()):
        return True
    log.warning("kernels for the CPU compute experts wrongly here: torch computes instead")
    return False


@cache
def _kernels() -> ctypes.CDLL:
    kernels = library()
    assert kernels is not None, "layers ask for kernels only if there are some"
    kernels.mgpu_experts.argtypes = [ctypes.c_void_p]
    kernels.mgpu_experts.restype = None
    kernels.mgpu_experts_room.argtypes = [ctypes.c_void_p]
    kernels.mgpu_experts_room.restype = ctypes.c_int64
    return kernels
