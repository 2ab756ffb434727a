# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Attention of one new token per row over the paged KV cache, split along the context (flash decoding).

One program takes one KV head of one row and one stretch of its context; the query heads that share the KV head are one
tensor-core operand, padded to 16. The grid depends on the number of rows only, so a CUDA graph stays valid: how many of
a row's programs have work is computed on the device from its length, and the others leave at once.

Worked example: 1,000 tokens of context, 16 splits, tiles of 128 tokens. A stretch is cdiv(1000, 16) = 63 tokens,
rounded up to a tile: 128. So programs 0 to 7 have work (the last one 104 tokens), and 8 to 15 leave. Each of the eight
stores its sum, its largest score and its sum of weights. The last one to finish merges all eight in the order of the
context, so that the result does not depend on which one that was.

From the packed product, every program rotates its query heads, and the program with the end of the context first
writes the new key and value to the cache. That saves a kernel per layer.
"""

# R rows, H query heads, A packed heads, K head dim

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.attention.attend import attend, attend_pairs, combine, with_sinks
from mgpu.worker.kernels.attention.inputs import LOG2_E, UNLIMITED, PackedHeads, PagedCache
from mgpu.worker.kernels.attention.rope_cache import store_new_token, turned_heads
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

_OTHER_SHARED = 20 << 10
"""Most shared memory beside the tiles: four of keys and values with five stages, two with three."""
_MANY_PAIRS = 1024
"""From so many (row, KV head) pairs on each SM has more programs than it holds, and smaller ones are faster."""
_FEW_PAIRS = 4
"""Up to so many pairs a program has at most 384 tokens of a context of 8,192: smaller tiles begin sooner."""
COMBINE = 8
"""Stretches that the last program loads at once."""
_READY = (None, None, None, None, None, 0.0)
"""In place of `PackedHeads`: nothing is done to heads that are ready."""


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
    q_ptr, k_ptr, v_ptr, tables_ptr, lens_ptr, out_ptr, partial_ptr, counter_ptr,
    row_scale_ptr, cos_sin_ptr, q_weight_ptr, k_weight_ptr, new_k_ptr, new_v_ptr, sinks_ptr,
    eps, k_inverse_scale, v_inverse_scale,
    scale, v_scale, window,
    table_stride, q_row_stride, block_stride, token_stride, head_stride, stats_offset, splits,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, STRETCH: tl.constexpr, AT_ONCE: tl.constexpr,
    CHUNKED: tl.constexpr, FP8: tl.constexpr, PACKED: tl.constexpr, OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    num_heads = tl.num_programs(0)
    wait_for_inputs(OVERLAP)
    context = tl.load(lens_ptr + row)
    first = tl.maximum(context - 1, 0) // window * window if CHUNKED else tl.maximum(context - window, 0)
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
            # A cache of 8-bit values is read as words of two, and these are the strides of words.
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
    if sinks_ptr is not None:
        sinks_ptr += head * GROUP
    if count == 1:
        factor = v_scale
        if sinks_ptr is not None:
            shrink, total = with_sinks(sinks_ptr, g, g < GROUP, peak, total)
            factor *= shrink
        factor = (factor / tl.where(total > 0.0, total, 1.0))[:, None]
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
                out_ptr, partial_ptr + first_slot.to(tl.int64) * (GROUP * HEAD_DIM),
                stat_ptr + first_slot * GROUP * 2, count, v_scale, GROUP, HEADS, HEAD_DIM, AT_ONCE, sinks_ptr,
            )  # fmt: skip
            tl.store(counter_ptr + pair, 0)


def choose_tiling(
    rows: int, kv_heads: int, dim: int, cache_dtype: torch.dtype, shared: int = HOPPER_SHARED_BYTES
) -> DecodeTiling:
    """Choose by the size of the batch alone, so that graphs stay valid (see docs/kernels.md).

    Few (row, KV head) pairs are split until each SM has one program with large tiles. Many need no split and get small
    tiles, so that several programs fit on an SM. Fewer tiles are loaded at once if ``shared`` bytes of memory do not
    hold more.
    """
    tiling = _fastest_tiling(rows, kv_heads, dim, cache_dtype)
    tile_bytes = tiling.block_n * dim * cache_dtype.itemsize
    if 4 * tile_bytes + _OTHER_SHARED <= shared:
        return tiling
    block_n = tiling.block_n if 2 * tile_bytes + _OTHER_SHARED <= shared else tiling.block_n // 2
    return replace(tiling, block_n=block_n, num_stages=3)


def _fastest_tiling(rows: int, kv_heads: int, dim: int, cache_dtype: torch.dtype) -> DecodeTiling:
    pairs = rows * kv_heads
    is_wide_float8 = dim > 128 and cache_dtype.itemsize == 1
    # One program of wide float8 tiles has too few bytes on their way to keep the memory of an SM busy.
    programs = 2 * HOPPER_SMS if is_wide_float8 else HOPPER_SMS
    splits = 1
    while splits < 64 and pairs * splits * 2 <= programs:
        splits *= 2
    if is_wide_float8 and pairs < _MANY_PAIRS:
        return DecodeTiling(splits, 64)
    if dim > 128 or cache_dtype.itemsize > 2:
        return DecodeTiling(splits, 32)
    if cache_dtype.itemsize == 1:
        return DecodeTiling(splits, 128)
    if pairs <= _FEW_PAIRS:
        return DecodeTiling(splits, 64, stretch=384, num_stages=4)
    if pairs <= HOPPER_SMS:  # merging two short stretches takes longer than one program with both
        return DecodeTiling(splits, 128, stretch=256)
    return DecodeTiling(splits, 64, num_warps=4 if pairs < _MANY_PAIRS else 2, num_stages=3)


def decode_attention(
    heads: Tensor | PackedHeads,
    cache: PagedCache,
    *,
    scale: float,
    window: int | None = None,
    in_chunks: bool = False,
    sinks_H: Tensor | None = None,
    tiling: DecodeTiling | None = None,
    out_RHK: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attend from each row's last token (position ``context_len - 1``) to its context.

    ``heads``: queries [R, H, K] with any row stride, whose tokens are in the cache already. Or the packed product, for
    which `rope_and_cache` is done at once: the new key and value go to the place that the block table says, and rows
    with a context of 0 write nothing. ``window``: the last tokens that are seen, itself included; ``in_chunks``: what
    is seen begins at a multiple of it instead. ``sinks_H``: a score of each query head beside those of its context.
    Rows with a context of 0 yield zeros. K is a power of two from 16 on, of a float8 cache from 32 on.
    """
    num_kv, packed = cache.num_kv, None
    if isinstance(heads, PackedHeads):
        packed, heads = heads, heads.qkv_TAK
    rows, num_heads, dim = heads.shape
    num_q, device = num_heads if packed is None else num_heads - 2 * num_kv, heads.device
    group = num_q // num_kv
    tiling = tiling or choose_tiling(rows, num_kv, dim, cache.k_NBJK.dtype, shared_bytes(device))
    if out_RHK is None:
        out_RHK = torch.empty(rows, num_q, dim, dtype=heads.dtype, device=device)
    workspace = workspace or default_workspace(device)
    slots = rows * num_kv * tiling.splits
    if tiling.splits > 1:
        workspace.require(slots * group * (dim + 2), rows * num_kv)
    k, v = cache.k_NBJK, cache.v_NBJK
    if cache.is_fp8:  # read as words of two values, written value by value
        k, v = k.view(torch.int16), v.view(torch.int16)
    _, cos_sin, row_scale, q_weight, k_weight, eps = packed or _READY
    _decode_kernel[(num_kv, tiling.splits, rows)](
        heads, k, v, cache.tables_RP, cache.lens_R, out_RHK, workspace.partials, workspace.counters,
        row_scale, cos_sin, q_weight, k_weight, cache.k_NBJK, cache.v_NBJK, sinks_H,
        eps, 1.0 / cache.k_scale, 1.0 / cache.v_scale,
        scale * cache.k_scale * LOG2_E, cache.v_scale, window or UNLIMITED,
        cache.tables_RP.stride(0), heads.stride(0), *k.stride()[:3], slots * group * dim, tiling.splits,
        group, max(16, power_of_2(group)), power_of_2(group), dim,
        cache.block_size, tiling.block_n, tiling.stretch, COMBINE,
        in_chunks, cache.is_fp8, packed is not None, overlaps_launches(device), not INTERPRETED,
        **launch_options(device, tiling.num_warps, tiling.num_stages),
    )  # fmt: skip
    return out_RHK
