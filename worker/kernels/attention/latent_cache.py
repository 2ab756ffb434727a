# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Between the projections of latent attention and attention: normalize latents, rotate keys and queries, and store.

Of a few tokens further programs bring queries to the width of latents, which would be a kernel of its own.
"""

# T tokens, H query heads, C components without position, K rotated ones, N blocks, B tokens per block, P positions

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.attention.inputs import LatentProjections, NewLatents
from mgpu.worker.kernels.attention.latent_heads import COLUMNS, FEW_TOKENS, absorb_columns
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

HEADS_PER_PROGRAM = 16


@triton.jit
def _turned(source_ptr, angles_ptr, mask, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return both halves of rotated components; pairs that lie side by side are first taken apart."""
    HALF: tl.constexpr = ROTATED // 2
    i = tl.arange(0, HALF)
    first = i * 2 if INTERLEAVED else i
    second = first + 1 if INTERLEAVED else i + HALF
    low = tl.load(source_ptr + first[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source_ptr + second[None, :], mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(angles_ptr + i).to(tl.float32)[None, :]
    sin = tl.load(angles_ptr + HALF + i).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _latent_cache_kernel(
    kv_ptr, q_ptr, weight_ptr, angles_ptr, positions_ptr, slots_ptr, out_ptr, cache_ptr,
    plain_ptr, heads_ptr, wide_ptr,
    eps, kv_stride, q_token_stride, q_head_stride, angles_stride, block_stride, slot_stride,
    P, plain_token_stride, plain_head_stride, heads_stride,
    Q_HEADS: tl.constexpr, RANK: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, P_PAD: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if plain_ptr is not None and part >= PARTS:
        head = ((part - PARTS) // (RANK // COLUMNS)).to(tl.int64)
        absorb_columns(
            plain_ptr + token * plain_token_stride + head * plain_head_stride, heads_ptr + head * heads_stride,
            wide_ptr + (token * Q_HEADS + head) * RANK, P, RANK, (part - PARTS) % (RANK // COLUMNS) * COLUMNS,
            P_PAD, COLUMNS, OVERLAP,
        )  # fmt: skip
        return
    HALF: tl.constexpr = ROTATED // 2
    i = tl.arange(0, HALF)
    wait_for_inputs(OVERLAP)
    position = tl.load(positions_ptr + token).to(tl.int64)
    angles_ptr += position * angles_stride
    if part > 0:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        mask = head < Q_HEADS
        source = q_ptr + token * q_token_stride + head * q_head_stride
        low, high = _turned(source, angles_ptr, mask, ROTATED, INTERLEAVED)
        out = out_ptr + (token * Q_HEADS + head) * ROTATED + i[None, :]
        tl.store(out, low.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, high.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:  # tokens that only pad a graph's batch have slot -1
            c = tl.arange(0, RANK)
            source = kv_ptr + token * kv_stride
            x = tl.load(source + c).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * tl.load(weight_ptr + c).to(tl.float32)
            dtype: tl.constexpr = cache_ptr.dtype.element_ty
            place = cache_ptr + (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * slot_stride
            tl.store(place + c, x.to(dtype))
            one = tl.full([1, 1], 1, tl.int1)
            low, high = _turned(source + RANK, angles_ptr, one, ROTATED, INTERLEAVED)
            tl.store(place + RANK + i[None, :], low.to(dtype))
            tl.store(place + RANK + HALF + i[None, :], high.to(dtype))


def store_latents(
    new: NewLatents,
    table_PK: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    cache_NBK: Tensor,
    heads: LatentProjections | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Write the latents of new tokens to their slots, and return the rotated parts of queries [T, H, K].

    ``table_PK``: for each position cos of the K / 2 angles, then sin. Tokens with slot -1 are not stored. C and K are
    powers of two. With ``heads`` also return queries as wide as a latent [T, H, C], if the tokens are few.
    """
    q_THK, rank = new.q_THK, len(new.norm_C)
    (tokens, num_q, rotated), device, dtype = q_THK.shape, q_THK.device, q_THK.dtype
    out_THK, wide_THC = torch.empty(q_THK.shape, dtype=dtype, device=device), None
    per_program, columns = min(HEADS_PER_PROGRAM, power_of_2(num_q)), min(COLUMNS, rank)
    parts = 1 + ceil_div(num_q, per_program)
    absorbing: tuple[Tensor | None, ...] = (None, None, None)
    strides: tuple[int, ...] = (0, 0, 0, 0)
    plain = 1
    if heads is not None and tokens <= FEW_TOKENS:
        plain = heads.plain
        wide_THC = torch.empty(tokens, num_q, rank, dtype=dtype, device=device)
        absorbing = heads.q_THP, heads.weight_HXC, wide_THC
        strides = plain, *heads.q_THP.stride()[:2], heads.weight_HXC.stride(0)
    programs = parts if wide_THC is None else parts + num_q * (rank // columns)
    _latent_cache_kernel[(tokens, programs)](
        new.kv_TC, q_THK, new.norm_C, table_PK, positions_T, slots_T, out_THK, cache_NBK, *absorbing,
        new.eps, new.kv_TC.stride(0), *q_THK.stride()[:2], table_PK.stride(0), *cache_NBK.stride()[:2], *strides,
        num_q, rank, rotated, new.is_interleaved, cache_NBK.shape[1], per_program, parts, power_of_2(plain), columns,
        overlaps_launches(device), **launch_options(device, 4),
    )  # fmt: skip
    return out_THK, wide_THC
