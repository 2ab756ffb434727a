# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Attention of one new token per row over the paged KV cache, split along the context (flash decoding).

One program takes one KV head of one row and one stretch of its context; the query heads that share the KV head are one
tensor-core operand, padded to 16. The grid depends on the number of rows only: how many of a row's programs have work
is computed on the device from its length, the others leave at once. The last program of a (row, head) to finish
combines the stretches in order.
"""

# R rows, H query heads, J KV heads, G = H / J, K head dim, N blocks, B tokens per block, P pages of the longest table

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.runtime import (
    HOPPER_SMS,
    INTERPRETED,
    Workspace,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
    wait_for_inputs,
)
from mgpu.worker.kernels.widen import widen_fp8_pairs

LOG2_E = 1.4426950408889634
COMBINE = 8
"""Stretches that the last program loads at once."""


@dataclass(frozen=True, slots=True)
class DecodeTiling:
    """How one row's context is cut: see `choose_tiling`."""

    splits: int
    """Most programs of one (row, KV head)."""
    block_n: int
    """Tokens per step of a program."""
    stretch: int = 128
    """Fewest tokens worth a program of their own, a multiple of ``block_n``."""
    num_warps: int = 4
    num_stages: int = 5


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    first,
    begin,
    end,
    scale,
    block_stride,
    token_stride,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Give (weighted values, running maximum, sum of weights) over the tokens [begin, end) of one KV head.

    ``begin`` is a multiple of BLOCK_N; tokens before ``first`` are left out.
    """
    d = tl.arange(0, HEAD_DIM)
    acc = tl.zeros([GROUP_PAD, HEAD_DIM], tl.float32)
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = (n < end) & (n >= first)
        if BLOCK_SIZE % BLOCK_N == 0:  # the tile is in one page
            page = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        else:
            page = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
        offsets = (page * block_stride + (n % BLOCK_SIZE) * token_stride)[:, None] + d[None, :]
        # Masked, not merely ignored: what is past the context may be NaN, and 0 * NaN is NaN.
        k = tl.load(k_ptr + offsets, mask=valid[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + offsets, mask=valid[:, None], other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit
def _attend_pairs(
    q_even,
    q_odd,
    k_ptr,
    v_ptr,
    table_ptr,
    first,
    begin,
    end,
    scale,
    block_stride,
    token_stride,
    GROUP_PAD: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Like `_attend` for a cache of int16 words with two e4m3 values; even and odd dimensions are apart."""
    d = tl.arange(0, HALF_DIM)
    acc_even = tl.zeros([GROUP_PAD, HALF_DIM], tl.float32)
    acc_odd = tl.zeros([GROUP_PAD, HALF_DIM], tl.float32)
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = (n < end) & (n >= first)
        if BLOCK_SIZE % BLOCK_N == 0:
            page = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        else:
            page = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
        offsets = (page * block_stride + (n % BLOCK_SIZE) * token_stride)[:, None] + d[None, :]
        k_even, k_odd = widen_fp8_pairs(tl.trans(tl.load(k_ptr + offsets, mask=valid[:, None], other=0)), ASSEMBLY)
        scores = tl.dot(q_even, k_even, input_precision="ieee")
        scores = tl.dot(q_odd, k_odd, scores, input_precision="ieee") * scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        v_even, v_odd = widen_fp8_pairs(tl.load(v_ptr + offsets, mask=valid[:, None], other=0), ASSEMBLY)
        weights = weights.to(tl.float16)
        acc_even = tl.dot(weights, v_even, acc_even * shrink[:, None], input_precision="ieee")
        acc_odd = tl.dot(weights, v_odd, acc_odd * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc_even, acc_odd, peak, total


@triton.jit
def _combine(
    out_ptr,
    acc_ptr,
    stat_ptr,
    count,
    v_scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Merge ``count`` stretches, always in the same order, and write the result. HEADS is GROUP's power of two."""
    s = tl.arange(0, AT_ONCE)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, HEAD_DIM)
    acc = tl.zeros([HEADS, HEAD_DIM], tl.float32)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in range(0, count, AT_ONCE):
        mask = (start + s < count)[:, None] & (g < GROUP)[None, :]
        row = (start + s)[:, None] * GROUP + g[None, :]
        peaks = tl.load(stat_ptr + row * 2, mask=mask, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stat_ptr + row * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
        values = tl.load(
            acc_ptr + row[:, :, None] * HEAD_DIM + d[None, None, :],
            mask=mask[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        known = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # padding heads: no -inf minus -inf
        weights = tl.exp2(peaks - known[None, :])
        shrink = tl.exp2(peak - known)
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        total = total * shrink + tl.sum(totals * weights, 0)
        peak = new_peak
    out = acc * (v_scale / tl.where(total > 0.0, total, 1.0))[:, None]
    tl.store(out_ptr + g[:, None] * HEAD_DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=(g < GROUP)[:, None])


@triton.jit(do_not_specialize=["window", "table_stride", "stats_offset", "splits"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    lens_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    scale,
    v_scale,
    window,
    table_stride,
    q_row_stride,
    block_stride,
    token_stride,
    head_stride,
    stats_offset,
    splits,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRETCH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FP8: tl.constexpr,
    OVERLAP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    num_heads = tl.num_programs(0)
    wait_for_inputs(OVERLAP)
    context = tl.load(lens_ptr + row)
    first = tl.maximum(context - window, 0)
    # Stretches are whole tiles; a row without context (padding of a graph) has one, empty, and yields zeros.
    aligned = first // BLOCK_N * BLOCK_N
    stretch = tl.maximum(tl.cdiv(tl.cdiv(context - aligned, splits), BLOCK_N) * BLOCK_N, STRETCH)
    count = tl.maximum(tl.cdiv(context - aligned, stretch), 1)
    if split >= count:
        return

    g = tl.arange(0, GROUP_PAD)
    real = (g < GROUP)[:, None]
    # Dimensions of a tile: all, or with FP8 the even ones, each followed by an odd one.
    STEP: tl.constexpr = 2 if FP8 else 1
    d = tl.arange(0, HEAD_DIM // STEP)
    tile = g[:, None] * HEAD_DIM + (d * STEP)[None, :]
    q_ptrs = q_ptr + row.to(tl.int64) * q_row_stride + head * (GROUP * HEAD_DIM) + tile
    k_ptr += head * head_stride
    v_ptr += head * head_stride
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    begin = aligned + split * stretch
    end = tl.minimum(begin + stretch, context)
    q = tl.load(q_ptrs, mask=real, other=0.0)
    if FP8:
        q_odd = tl.load(q_ptrs + 1, mask=real, other=0.0).to(tl.float16)
        acc, acc_odd, peak, total = _attend_pairs(
            q.to(tl.float16), q_odd, k_ptr, v_ptr, table_ptr, first, begin, end, scale, block_stride, token_stride,
            GROUP_PAD, HEAD_DIM // 2, BLOCK_SIZE, BLOCK_N, ASSEMBLY,
        )  # fmt: skip
    else:
        acc, peak, total = _attend(
            q, k_ptr, v_ptr, table_ptr, first, begin, end, scale, block_stride, token_stride,
            GROUP_PAD, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip

    out_ptr += row.to(tl.int64) * (num_heads * GROUP * HEAD_DIM) + head * (GROUP * HEAD_DIM)
    if count == 1:
        factor = (v_scale / tl.where(total > 0.0, total, 1.0))[:, None]
        tl.store(out_ptr + tile, (acc * factor).to(out_ptr.dtype.element_ty), mask=real)
        if FP8:
            tl.store(out_ptr + tile + 1, (acc_odd * factor).to(out_ptr.dtype.element_ty), mask=real)
    else:
        pair = row * num_heads + head
        slot = pair * splits + split
        stat_ptr = partial_ptr + stats_offset
        acc_ptr = partial_ptr + slot.to(tl.int64) * (GROUP * HEAD_DIM) + tile
        tl.store(acc_ptr, acc, mask=real)
        if FP8:
            tl.store(acc_ptr + 1, acc_odd, mask=real)
        tl.store(stat_ptr + (slot * GROUP + g) * 2, peak, mask=g < GROUP)
        tl.store(stat_ptr + (slot * GROUP + g) * 2 + 1, total, mask=g < GROUP)
        tl.debug_barrier()  # all threads' stores precede the release below
        arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel")
        if arrived == count - 1:
            first_slot = pair * splits
            _combine(
                out_ptr,
                partial_ptr + first_slot.to(tl.int64) * (GROUP * HEAD_DIM),
                stat_ptr + first_slot * GROUP * 2,
                count,
                v_scale,
                GROUP,
                HEADS,
                HEAD_DIM,
                AT_ONCE,
            )
            tl.store(counter_ptr + pair, 0)


def choose_tiling(rows: int, kv_heads: int, dim: int, cache_dtype: torch.dtype) -> DecodeTiling:
    """Choose by the size of the batch alone, so that graphs stay valid (see docs/kernels.md).

    Few (row, KV head) pairs are split until each SM has one program with large tiles; many need no split, and small
    tiles, of which several programs fit on an SM.
    """
    pairs = rows * kv_heads
    splits = 1
    while splits < 64 and pairs * splits * 2 <= HOPPER_SMS:
        splits *= 2
    if dim > 128 or cache_dtype.itemsize > 2:
        return DecodeTiling(splits, 32)
    if pairs <= HOPPER_SMS or cache_dtype.itemsize == 1:
        return DecodeTiling(splits, 128)
    return DecodeTiling(splits, 64, num_stages=3)


def decode_attention(
    q_RHK: Tensor,
    k_NBJK: Tensor,
    v_NBJK: Tensor,
    block_tables_RP: Tensor,
    context_lens_R: Tensor,
    *,
    scale: float,
    window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tiling: DecodeTiling | None = None,
    out_RHK: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attend from each row's last token (position ``context_len - 1``, already in the cache) to its context.

    q may have any row stride. The cache has q's type, or is float8_e4m3fn holding values divided by ``k_scale`` and
    ``v_scale``; k and v have equal strides, K contiguous. ``window``: the last tokens that are seen, itself included.
    Rows with a context of 0 give zeros. K is a power of two from 16 on, of a float8 cache from 32 on.
    """
    rows, num_q, dim = q_RHK.shape
    block_size, num_kv = k_NBJK.shape[1], k_NBJK.shape[2]
    group = num_q // num_kv
    heads = power_of_2(group)
    if out_RHK is None:
        out_RHK = torch.empty(rows, num_q, dim, dtype=q_RHK.dtype, device=q_RHK.device)
    tiling = tiling or choose_tiling(rows, num_kv, dim, k_NBJK.dtype)
    splits = tiling.splits
    workspace = workspace or default_workspace(q_RHK.device)
    is_fp8 = k_NBJK.dtype == torch.float8_e4m3fn
    if is_fp8:
        k_NBJK, v_NBJK = k_NBJK.view(torch.int16), v_NBJK.view(torch.int16)
    slots = rows * num_kv * splits
    if splits > 1:
        workspace.require(slots * group * (dim + 2), rows * num_kv)
    _decode_kernel[(num_kv, splits, rows)](
        q_RHK,
        k_NBJK,
        v_NBJK,
        block_tables_RP,
        context_lens_R,
        out_RHK,
        workspace.partials,
        workspace.counters,
        scale * k_scale * LOG2_E,
        v_scale,
        window or 1 << 30,
        block_tables_RP.stride(0),
        q_RHK.stride(0),
        k_NBJK.stride(0),
        k_NBJK.stride(1),
        k_NBJK.stride(2),
        slots * group * dim,
        splits,
        group,
        max(16, heads),
        heads,
        dim,
        block_size,
        tiling.block_n,
        tiling.stretch,
        COMBINE,
        is_fp8,
        overlaps_launches(q_RHK.device),
        not INTERPRETED,
        **launch_options(q_RHK.device, tiling.num_warps, tiling.num_stages),
    )
    return out_RHK
