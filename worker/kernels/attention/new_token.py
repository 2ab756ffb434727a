# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Turn a decoding row's heads by the angles of its position, and put its key and value into the cache."""

# K head dim

import triton
import triton.language as tl

from mgpu.worker.kernels.attention.rope_cache import saturate


@triton.jit
def turned_heads(
    heads_ptr, exists, d, row_scale, angles_ptr, weight_ptr, eps, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Give dimensions ``d`` of COUNT heads in float32, scaled, normalized if there is a weight, and rotated.

    ``angles_ptr``: cos of the K / 2 angles, then sin. ``exists`` [COUNT, 1]: the others give zeros.
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
    """Turn one key head and store it and its value head, divided by the scales of the cache."""
    d = tl.arange(0, HEAD_DIM)
    one = tl.full([1, 1], 1, tl.int1)
    key = turned_heads(key_ptr, one, d, row_scale, angles_ptr, k_weight_ptr, eps, 1, HEAD_DIM)
    value = tl.load(value_ptr + d[None, :]).to(tl.float32) * row_scale
    dtype: tl.constexpr = k_out_ptr.dtype.element_ty
    tl.store(k_out_ptr + d[None, :], saturate(key * k_inverse_scale, dtype).to(dtype))
    tl.store(v_out_ptr + d[None, :], saturate(value * v_inverse_scale, dtype).to(dtype))
