# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Attention of one new token per row over the paged KV cache, split along the context (flash decoding).

One program takes one KV head of one row and one stretch of its context; the query heads that share the KV head are one
tensor-core operand, padded to 16. The grid depends on the number of rows only: how many of a row's programs have work
is computed on the device from its length, the others leave at once. The last program of a (row, head) to finish
combines the stretches in order.

`decode_attention_packed` starts from the product of queries, keys and values: every program turns its query heads, and
the one with the end of a context first writes the new key and value to the cache. That saves a kernel per layer.
"""

# R rows, H query heads, J KV heads, G = H / J, K head dim, N blocks, B tokens per block, P pages of the longest table

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.attention.interface import HeadNorms
from mgpu.worker.kernels.attention.attend import attend, attend_pairs, combine
from mgpu.worker.kernels.attention.new_token import store_new_token, turned_heads
from mgpu.worker.kernels.runtime import (
    HOPPER_SHARED_BYTES,
    HOPPER_SMS,
    INTERPRETED,
    Workspace,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
    shared_bytes,
    wait_for_inputs,
)

LOG2_E = 1.4426950408889634
_OTHER_SHARED = 20 << 10
"""What is in shared memory beside four tiles of keys and values with five stages, or two with three: at most this."""
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
    row_scale_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    new_k_ptr,
    new_v_ptr,
    eps,
    k_inverse_scale,
    v_inverse_scale,
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
    PACKED: tl.constexpr,
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
    row_ptr = q_ptr + row.to(tl.int64) * q_row_stride
    heads_ptr = row_ptr + head * (GROUP * HEAD_DIM)
    k_ptr += head * head_stride
    v_ptr += head * head_stride
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    begin = aligned + split * stretch
    end = tl.minimum(begin + stretch, context)
    if PACKED:
        row_scale = 1.0
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + row)
        angles_ptr = cos_sin_ptr + tl.maximum(context - 1, 0).to(tl.int64) * HEAD_DIM
        q = turned_heads(heads_ptr, real, d * STEP, row_scale, angles_ptr, q_weight_ptr, eps, GROUP_PAD, HEAD_DIM)
        q = q.to(row_ptr.dtype.element_ty)
        if (split == count - 1) & (context > 0):
            new_ptr = row_ptr + (num_heads * GROUP + head) * HEAD_DIM
            page = tl.load(table_ptr + (context - 1) // BLOCK_SIZE).to(tl.int64)
            # The cache of 8-bit values is read as words of two, whose strides these are.
            place = (page * block_stride + ((context - 1) % BLOCK_SIZE) * token_stride + head * head_stride) * STEP
            store_new_token(
                new_ptr, new_ptr + num_heads * HEAD_DIM, new_k_ptr + place, new_v_ptr + place, row_scale, angles_ptr,
                k_weight_ptr, eps, k_inverse_scale, v_inverse_scale, HEAD_DIM,
            )  # fmt: skip
            tl.debug_barrier()  # the program's other threads read them below
    else:
        q = tl.load(heads_ptr + tile, mask=real, other=0.0)
    if FP8:
        if PACKED:
            q_odd = turned_heads(
                heads_ptr, real, d * STEP + 1, row_scale, angles_ptr, q_weight_ptr, eps, GROUP_PAD, HEAD_DIM
            )
            q_odd = q_odd.to(row_ptr.dtype.element_ty).to(tl.float16)
        else:
            q_odd = tl.load(heads_ptr + tile + 1, mask=real, other=0.0).to(tl.float16)
        acc, acc_odd, peak, total = attend_pairs(
            q.to(tl.float16), q_odd, k_ptr, v_ptr, table_ptr, first, begin, end, scale, block_stride, token_stride,
            GROUP_PAD, HEAD_DIM // 2, BLOCK_SIZE, BLOCK_N, ASSEMBLY,
        )  # fmt: skip
    else:
        acc, peak, total = attend(
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
            combine(
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


def choose_tiling(
    rows: int, kv_heads: int, dim: int, cache_dtype: torch.dtype, shared: int = HOPPER_SHARED_BYTES
) -> DecodeTiling:
    """Choose by the size of the batch alone, so that graphs stay valid (see docs/kernels.md).

    Few (row, KV head) pairs are split until each SM has one program with large tiles; many need no split, and small
    tiles, of which several programs fit on an SM. Fewer tiles are under way at once where ``shared`` bytes of memory do
    not hold more.
    """
    tiling = _fastest_tiling(rows, kv_heads, dim, cache_dtype)
    tile_bytes = tiling.block_n * dim * cache_dtype.itemsize
    return tiling if 4 * tile_bytes + _OTHER_SHARED <= shared else replace(tiling, num_stages=3)


def _fastest_tiling(rows: int, kv_heads: int, dim: int, cache_dtype: torch.dtype) -> DecodeTiling:
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
    return _launch(
        q_RHK, k_NBJK, v_NBJK, block_tables_RP, context_lens_R, q_RHK.shape[1], None, None, None,
        scale, window, k_scale, v_scale, tiling, out_RHK, workspace,
    )  # fmt: skip


def decode_attention_packed(
    qkv_RAK: Tensor,
    cos_sin_PK: Tensor,
    k_NBJK: Tensor,
    v_NBJK: Tensor,
    block_tables_RP: Tensor,
    context_lens_R: Tensor,
    *,
    scale: float,
    norms: HeadNorms | None = None,
    scale_R: Tensor | None = None,
    window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tiling: DecodeTiling | None = None,
    out_RHK: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Do `rope_and_cache` and `decode_attention` at once for rows whose new token is at ``context_len - 1``.

    ``qkv_RAK``: query, key, value heads of each row, contiguous within a row. ``cos_sin_PK``: contiguous, for each
    position cos of the K / 2 angles, then sin. With ``scale_R`` (float32) a row is multiplied by its scale first. The
    new key and value go to the place that the block table says; rows with a context of 0 write nothing.
    """
    num_q = qkv_RAK.shape[1] - 2 * k_NBJK.shape[2]
    return _launch(
        qkv_RAK, k_NBJK, v_NBJK, block_tables_RP, context_lens_R, num_q, scale_R, cos_sin_PK, norms,
        scale, window, k_scale, v_scale, tiling, out_RHK, workspace,
    )  # fmt: skip


def _launch(
    heads_RAK: Tensor,
    k_NBJK: Tensor,
    v_NBJK: Tensor,
    block_tables_RP: Tensor,
    context_lens_R: Tensor,
    num_q: int,
    scale_R: Tensor | None,
    cos_sin_PK: Tensor | None,
    norms: HeadNorms | None,
    scale: float,
    window: int | None,
    k_scale: float,
    v_scale: float,
    tiling: DecodeTiling | None,
    out_RHK: Tensor | None,
    workspace: Workspace | None,
) -> Tensor:
    rows, dim = heads_RAK.shape[0], heads_RAK.shape[2]
    block_size, num_kv = k_NBJK.shape[1], k_NBJK.shape[2]
    group = num_q // num_kv
    heads = power_of_2(group)
    if out_RHK is None:
        out_RHK = torch.empty(rows, num_q, dim, dtype=heads_RAK.dtype, device=heads_RAK.device)
    tiling = tiling or choose_tiling(rows, num_kv, dim, k_NBJK.dtype, shared_bytes(heads_RAK.device))
    splits = tiling.splits
    workspace = workspace or default_workspace(heads_RAK.device)
    is_fp8 = k_NBJK.dtype == torch.float8_e4m3fn
    new_k, new_v = k_NBJK, v_NBJK
    if is_fp8:
        k_NBJK, v_NBJK = k_NBJK.view(torch.int16), v_NBJK.view(torch.int16)
    slots = rows * num_kv * splits
    if splits > 1:
        workspace.require(slots * group * (dim + 2), rows * num_kv)
    _decode_kernel[(num_kv, splits, rows)](
        heads_RAK,
        k_NBJK,
        v_NBJK,
        block_tables_RP,
        context_lens_R,
        out_RHK,
        workspace.partials,
        workspace.counters,
        scale_R,
        cos_sin_PK,
        norms.q_weight if norms else None,
        norms.k_weight if norms else None,
        new_k,
        new_v,
        norms.eps if norms else 0.0,
        1.0 / k_scale,
        1.0 / v_scale,
        scale * k_scale * LOG2_E,
        v_scale,
        window or 1 << 30,
        block_tables_RP.stride(0),
        heads_RAK.stride(0),
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
        cos_sin_PK is not None,
        overlaps_launches(heads_RAK.device),
        not INTERPRETED,
        **launch_options(heads_RAK.device, tiling.num_warps, tiling.num_stages),
    )
    return out_RHK
