# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""The projections between heads and latents, in both directions: one small matrix per head.

A few tokens take kernels that read each matrix once, with programs for parts of it. More tokens take a library.
"""

# T tokens, H query heads, P plain components of a query, V value dim, X = P + V, C components of a latent

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

FEW_TOKENS = 4
COLUMNS, _ROWS = 64, 16
"""Of a head's matrix that one program has: columns to absorb a query, rows for values."""


@triton.jit
def absorb_columns(
    q_ptr, w_ptr, out_ptr, P, C, first, P_PAD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Multiply the query of one head by BLOCK columns of its matrix, from ``first`` on. Waits for the query."""
    p = tl.arange(0, P_PAD)
    c = first + tl.arange(0, BLOCK)
    mask = (p < P)[:, None] & (c < C)[None, :]
    w = tl.load(w_ptr + p[:, None] * C + c[None, :], mask=mask, other=0.0)
    wait_for_inputs(OVERLAP)
    q = tl.load(q_ptr + p, mask=p < P, other=0.0)
    out = tl.sum(w.to(tl.float32) * q.to(tl.float32)[:, None], 0)
    tl.store(out_ptr + c, out.to(out_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _absorb_kernel(
    q_ptr, w_ptr, out_ptr, P, C, q_token_stride, q_head_stride, w_head_stride,
    P_PAD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(2).to(tl.int64)
    absorb_columns(
        q_ptr + token * q_token_stride + head * q_head_stride, w_ptr + head * w_head_stride,
        out_ptr + (token * tl.num_programs(0) + head) * C, P, C, tl.program_id(1) * BLOCK, P_PAD, BLOCK, OVERLAP,
    )  # fmt: skip


@triton.jit
def _values_kernel(
    x_ptr, w_ptr, out_ptr, P, V, C, x_token_stride, x_head_stride, w_head_stride,
    C_PAD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    token = tl.program_id(2).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C_PAD)
    mask = (v < V)[:, None] & (c < C)[None, :]
    rows_ptr = w_ptr + head.to(tl.int64) * w_head_stride + (P + v)[:, None] * C
    w = tl.load(rows_ptr + c[None, :], mask=mask, other=0.0)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + token * x_token_stride + head * x_head_stride + c, mask=c < C, other=0.0)
    out = tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    out_ptr += (token * tl.num_programs(0) + head) * V
    tl.store(out_ptr + v, out.to(out_ptr.dtype.element_ty), mask=v < V)


def absorb(q_THP: Tensor, weight_HXC: Tensor) -> Tensor:
    """Return queries as wide as a latent, [T, H, C]. ``weight``: the rows of keys, then those of values."""
    tokens, heads, plain = q_THP.shape
    if tokens > FEW_TOKENS:
        return torch.bmm(q_THP.transpose(0, 1), weight_HXC[:, :plain]).transpose(0, 1)
    rank = weight_HXC.shape[2]
    out_THC = torch.empty(tokens, heads, rank, dtype=q_THP.dtype, device=q_THP.device)
    block = min(COLUMNS, power_of_2(rank))
    _absorb_kernel[(heads, ceil_div(rank, block), tokens)](
        q_THP, weight_HXC, out_THC, plain, rank, *q_THP.stride()[:2], weight_HXC.stride(0),
        power_of_2(plain), block, overlaps_launches(q_THP.device), **launch_options(q_THP.device, 4, 1),
    )  # fmt: skip
    return out_THC


def values(attended_THC: Tensor, weight_HXC: Tensor, plain: int) -> Tensor:
    """Return the values of attended latents, [T, H, V]. ``plain``: rows of keys in ``weight``."""
    tokens, heads, rank = attended_THC.shape
    if tokens > FEW_TOKENS:
        return torch.bmm(attended_THC.transpose(0, 1), weight_HXC[:, plain:].transpose(1, 2)).transpose(0, 1)
    value_dim = weight_HXC.shape[1] - plain
    out_THV = torch.empty(tokens, heads, value_dim, dtype=attended_THC.dtype, device=attended_THC.device)
    block = min(_ROWS, power_of_2(value_dim))
    _values_kernel[(heads, ceil_div(value_dim, block), tokens)](
        attended_THC, weight_HXC, out_THV, plain, value_dim, rank, *attended_THC.stride()[:2], weight_HXC.stride(0),
        power_of_2(rank), block, overlaps_launches(attended_THC.device),
        **launch_options(attended_THC.device, 4, 1),
    )  # fmt: skip
    return out_THV
