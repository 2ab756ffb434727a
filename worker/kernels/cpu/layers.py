"""What a layer does between its products, on the CPU in bfloat16: each is one call where torch needs several.

All are summed in float32 and rounded once. Every function here is also in plain torch, and layers take that where
`takes_rows` or `takes_heads` is false.
"""

# T tokens, D model dim, F feed-forward dim, R rows, H query heads, J KV heads, K head dim, S most slots, N slots

import ctypes
import logging
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.cpu.library import library

log = logging.getLogger(__name__)

LANES = 16
_LARGEST_HEAD = 512


class Seen(NamedTuple):
    """The slots of the cache that rows see: the first of each row's, [R, S], as many as ``counts_R`` says."""

    slots_RS: Tensor
    counts_R: Tensor


def add_norm(residual_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    """Add ``delta`` to the residual in place and return the root-mean-square norm of the sum."""
    out_TD = torch.empty_like(residual_TD)
    delta = None if delta_TD is None else delta_TD.data_ptr()
    rows, size = residual_TD.shape
    _kernels().mgpu_add_norm(
        out_TD.data_ptr(), residual_TD.data_ptr(), delta, weight_D.data_ptr(), rows, size, eps
    )  # fmt: skip
    return out_TD


def gate(gate_up_TF2: Tensor, is_gelu: bool) -> Tensor:
    """Return SiLU, or GELU by its tanh, of the first half of each row times the second."""
    rows, size = len(gate_up_TF2), gate_up_TF2.shape[1] // 2
    out_TF = gate_up_TF2.new_empty((rows, size))
    _kernels().mgpu_gate(out_TF.data_ptr(), gate_up_TF2.data_ptr(), rows, size, is_gelu)
    return out_TF


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotate heads, which lie one after the other in each row."""
    rows, heads, size = x_THK.shape
    out_THK = torch.empty((rows, heads, size), dtype=x_THK.dtype)
    turns = cos_T1K.data_ptr(), sin_T1K.data_ptr()
    _kernels().mgpu_rotate(out_THK.data_ptr(), x_THK.data_ptr(), x_THK.stride(0), *turns, rows, heads, size)
    return out_THK


def attend(q_RHK: Tensor, k_NJK: Tensor, v_NJK: Tensor, seen: Seen, scale: float) -> Tensor:
    """Return the attention of one query of each row to the slots that it sees."""
    (rows, heads, size), num_kv, most = q_RHK.shape, k_NJK.shape[1], seen.slots_RS.shape[1]
    out_RHK = torch.empty((rows, heads, size), dtype=q_RHK.dtype)
    pointers = q_RHK.stride(0), k_NJK.data_ptr(), v_NJK.data_ptr(), seen.slots_RS.data_ptr(), seen.counts_R.data_ptr()
    sizes = rows, most, num_kv, heads // num_kv, size, scale
    _kernels().mgpu_attend(out_RHK.data_ptr(), q_RHK.data_ptr(), *pointers, *sizes)
    return out_RHK


def takes_rows(*rows: Tensor) -> bool:
    """Return whether `add_norm` and `gate` take these rows: bfloat16, 16 numbers at a time, where there are kernels."""
    are_sized = all(
        x.is_cpu and x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[-1] % (2 * LANES) == 0 for x in rows
    )
    return are_sized and has_kernels()


def takes_heads(x_THK: Tensor, *turns_T1K: Tensor) -> bool:
    """Return whether `rotate` and `attend` take these heads, with these cosines and sines; see `takes_rows`."""
    tokens, _, size = x_THK.shape
    if not all(x.is_contiguous() and x.dtype == x_THK.dtype and x.shape == (tokens, 1, size) for x in turns_T1K):
        return False
    is_sized = size % (2 * LANES) == 0 and size <= _LARGEST_HEAD and x_THK.stride()[1:] == (size, 1)
    return is_sized and x_THK.is_cpu and x_THK.dtype == torch.bfloat16 and has_kernels()


@cache
def has_kernels() -> bool:
    """Try the kernels once; False without a compiler, or if one differs from plain torch."""
    if library() is None:
        return False
    if (wrong := [name for name, error in _errors().items() if not error < 0.02]) == []:
        return True
    log.warning("kernels for the CPU compute %s wrongly here: torch computes instead", ", ".join(wrong))
    return False


def _errors() -> dict[str, float]:
    """Return how far each kernel is from plain torch, in sizes of its largest result."""
    drawn = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x, delta, weight = drawn[:3], drawn[3:6], drawn[6]
    heads, turns = drawn[:3].view(3, 4, 64), drawn[7:10, :64].unsqueeze(1).contiguous()
    k, v = drawn[8:16].view(-1, 2, 64), drawn[16:24].view(-1, 2, 64)
    slots = torch.arange(15).expand(3, 15).contiguous()
    keys, values = (each[:15].transpose(0, 1).repeat_interleave(2, 0).float() for each in (k, v))
    expected = F.scaled_dot_product_attention(heads.transpose(0, 1).float(), keys, values, scale=0.1).transpose(0, 1)
    pairs = {
        "norms": (
            add_norm(x.clone(), delta, weight, 1e-5),
            F.rms_norm((x + delta).float(), (256,), weight.float(), 1e-5),
        ),
        "gates": (gate(x, False), F.silu(x[:, :128].float()) * x[:, 128:].float()),
        "rotations": (rotate(heads, turns, turns), (heads.float() + heads.float().roll(32, -1)) * turns.float()),
        "attention": (attend(heads, k, v, Seen(slots, torch.full((3,), 15)), 0.1), expected),
    }
    return {
        name: float((found.float() - right).abs().max() / right.abs().max()) for name, (found, right) in pairs.items()
    }


@cache
def _kernels() -> ctypes.CDLL:
    kernels = library()
    assert kernels is not None, "layers ask for kernels only if there are some"
    p, n, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    kernels.mgpu_add_norm.argtypes = [p, p, p, p, n, n, f]
    kernels.mgpu_gate.argtypes = [p, p, n, n, ctypes.c_int32]
    kernels.mgpu_rotate.argtypes = [p, p, n, p, p, n, n, n]
    kernels.mgpu_attend.argtypes = [p, p, n, p, p, p, p, n, n, n, n, n, f]
    for name in ("add_norm", "gate", "rotate", "attend"):
        kernels[f"mgpu_{name}"].restype = None
    return kernels
