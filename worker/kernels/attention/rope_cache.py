# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Between the packed product and attention: scale, normalize and rotate heads, and write keys and values to the cache.

`rope_and_cache` does it in a kernel of its own. `decode_attention` can do it within attention, one head at a time:
`turned_heads` and `store_new_token` are its parts.
"""

# T tokens, H query heads, K head dim, N blocks, B tokens per block, J KV heads

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.attention.inputs import PackedHeads
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, power_of_2, wait_for_inputs

HEADS_PER_PROGRAM = 16


@triton.jit
def saturate(x, DTYPE: tl.constexpr):
    """Keep float8 from turning values past its largest into NaN."""
    if tl.float8e4nv == DTYPE:
        x = tl.clamp(x, -448.0, 448.0)
    return x


@triton.jit
def _rope_cache_kernel(
    qkv_ptr, scale_ptr, cos_sin_ptr, positions_ptr, slots_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, v_ptr,
    eps, k_inverse_scale, v_inverse_scale,
    qkv_stride, cos_sin_stride, block_stride, token_stride, head_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    is_query = head < Q_HEADS
    is_key = (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    is_value = (head >= Q_HEADS + KV_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
    exists = (head < Q_HEADS + 2 * KV_HEADS)[:, None]
    wait_for_inputs(OVERLAP)

    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token)
    cos = tl.load(cos_sin_ptr + position * cos_sin_stride + i).to(tl.float32)[None, :]
    sin = tl.load(cos_sin_ptr + position * cos_sin_stride + HALF + i).to(tl.float32)[None, :]
    source = qkv_ptr + token * qkv_stride + head[:, None] * HEAD_DIM + i[None, :]
    low = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=exists, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + token)
        low, high = low * scale, high * scale
    turned_low, turned_high = low, high
    if q_weight_ptr is not None:
        factor = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
        q_low = tl.load(q_weight_ptr + i).to(tl.float32)[None, :]
        q_high = tl.load(q_weight_ptr + HALF + i).to(tl.float32)[None, :]
        k_low = tl.load(k_weight_ptr + i).to(tl.float32)[None, :]
        k_high = tl.load(k_weight_ptr + HALF + i).to(tl.float32)[None, :]
        turned_low = low * factor * tl.where(is_query[:, None], q_low, k_low)
        turned_high = high * factor * tl.where(is_query[:, None], q_high, k_high)
    new_low = turned_low * cos - turned_high * sin
    new_high = turned_high * cos + turned_low * sin

    q_out = q_ptr + token * (Q_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + i[None, :]
    tl.store(q_out, new_low.to(q_ptr.dtype.element_ty), mask=is_query[:, None])
    tl.store(q_out + HALF, new_high.to(q_ptr.dtype.element_ty), mask=is_query[:, None])
    # Tokens that only pad a graph's batch have slot -1 and are not stored.
    place = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * token_stride
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    new_low, new_high = saturate(new_low * k_inverse_scale, dtype), saturate(new_high * k_inverse_scale, dtype)
    low, high = saturate(low * v_inverse_scale, dtype), saturate(high * v_inverse_scale, dtype)
    k_out = k_ptr + place + (head - Q_HEADS)[:, None] * head_stride + i[None, :]
    k_mask = (is_key & (slot >= 0))[:, None]
    tl.store(k_out, new_low.to(dtype), mask=k_mask)
    tl.store(k_out + HALF, new_high.to(dtype), mask=k_mask)
    v_out = v_ptr + place + (head - Q_HEADS - KV_HEADS)[:, None] * head_stride + i[None, :]
    v_mask = (is_value & (slot >= 0))[:, None]
    tl.store(v_out, low.to(dtype), mask=v_mask)
    tl.store(v_out + HALF, high.to(dtype), mask=v_mask)


def rope_and_cache(
    heads: PackedHeads,
    positions_T: Tensor,
    slots_T: Tensor,
    k_NBJK: Tensor,
    v_NBJK: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Write rotated keys and the values to their slots and return rotated queries [T, H, K].

    Tokens with slot -1 are not stored. A float8 cache gets the values divided by the scales, saturating.
    """
    qkv_TAK, cos_sin_PK, scale_T, q_weight, k_weight, eps = heads
    tokens, num_heads, dim = qkv_TAK.shape
    block_size, num_kv = k_NBJK.shape[1], k_NBJK.shape[2]
    num_q = num_heads - 2 * num_kv
    q_THK = torch.empty(tokens, num_q, dim, dtype=qkv_TAK.dtype, device=qkv_TAK.device)
    per_program = min(HEADS_PER_PROGRAM, power_of_2(num_heads))
    _rope_cache_kernel[(tokens, ceil_div(num_heads, per_program))](
        qkv_TAK, scale_T, cos_sin_PK, positions_T, slots_T, q_weight, k_weight, q_THK, k_NBJK, v_NBJK,
        eps, 1.0 / k_scale, 1.0 / v_scale,
        qkv_TAK.stride(0), cos_sin_PK.stride(0), *k_NBJK.stride()[:3],
        num_q, num_kv, dim, block_size,
        per_program, overlaps_launches(qkv_TAK.device),
        **launch_options(qkv_TAK.device, 4),
    )  # fmt: skip
    return q_THK


@triton.jit
def turned_heads(
    heads_ptr, exists, d, row_scale, angles_ptr, weight_ptr, eps, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Return dimensions ``d`` of COUNT heads in float32, scaled, normalized if there is a weight, and rotated.

    ``angles_ptr``: cos of the K / 2 angles, then sin. ``exists`` [COUNT, 1]: False for heads to return zeros for.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    rows = heads_ptr + tl.arange(0, COUNT)[:, None] * HEAD_DIM
    x = tl.load(rows + d[None, :], mask=exists, other=0.0).to(tl.float32) * row_scale
    y = tl.load(rows + partner[None, :], mask=exists, other=0.0).to(tl.float32) * row_scale
    if weight_ptr is not None:
        whole = tl.load(rows + tl.arange(0, HEAD_DIM)[None, :], mask=exists, other=0.0).to(tl.float32) * row_scale
        factor = tl.rsqrt(tl.sum(whole * whole, 1) / HEAD_DIM + eps)[:, None]
        x = x * factor * tl.load(weight_ptr + d).to(tl.float32)[None, :]
        y = y * factor * tl.load(weight_ptr + partner).to(tl.float32)[None, :]
    cos = tl.load(angles_ptr + d % HALF).to(tl.float32)
    sin = tl.load(angles_ptr + HALF + d % HALF).to(tl.float32)
    return x * cos[None, :] + y * tl.where(d < HALF, -sin, sin)[None, :]


@triton.jit
def store_new_token(
    key_ptr,
    value_ptr,
    k_out_ptr,
    v_out_ptr,
    row_scale,
    angles_ptr,
    k_weight_ptr,
    eps,
    k_inverse_scale,
    v_inverse_scale,
    HEAD_DIM: tl.constexpr,
):
    """Rotate one key head and store it and its value head, divided by the scales of the cache."""
    d = tl.arange(0, HEAD_DIM)
    one = tl.full([1, 1], 1, tl.int1)
    key = turned_heads(key_ptr, one, d, row_scale, angles_ptr, k_weight_ptr, eps, 1, HEAD_DIM)
    value = tl.load(value_ptr + d[None, :]).to(tl.float32) * row_scale
    dtype: tl.constexpr = k_out_ptr.dtype.element_ty
    tl.store(k_out_ptr + d[None, :], saturate(key * k_inverse_scale, dtype).to(dtype))
    tl.store(v_out_ptr + d[None, :], saturate(value * v_inverse_scale, dtype).to(dtype))
