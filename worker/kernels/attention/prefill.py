# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Causal attention of chunks of new tokens over the paged KV cache (flash attention, rows of unequal length).

One program takes BLOCK_M consecutive queries of one row and one query head. The grid is an upper bound that depends on
the number of tokens and rows alone; each program finds its row from the query starts. Late queries come first: they
have the most keys, so the long programs do not end up last.
"""

# T tokens, R rows, H query heads, K head dim

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mgpu.worker.kernels.attention.attend import with_sinks
from mgpu.worker.kernels.attention.inputs import LOG2_E, UNLIMITED, PagedCache
from mgpu.worker.kernels.runtime import (
    HOPPER_SHARED_BYTES,
    ceil_div,
    launch_options,
    overlaps_launches,
    shared_bytes,
    wait_for_inputs,
)

ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class PrefillTiling:
    """Queries and keys per step of a program: see `choose_tiling`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    bulk: bool = True
    """Load through tensor maps where a tile's keys lie in one page."""
    max_registers: int | None = None
    """Cap per thread, so that a second program fits on the SM and computes while this one waits."""


@triton.jit
def find_row(tile, starts_ptr, num_rows, BLOCK_M: tl.constexpr, AT_ONCE: tl.constexpr):
    """Return the row that owns a tile. Row r's tiles begin at (start_r - start_0) // BLOCK_M + r: enough for each.

    Example: rows of 100 and 10 queries, BLOCK_M 64. Tiles 0 and 1 are row 0's, tile 100 // 64 + 1 = 2 is row 1's.
    """
    base = tl.load(starts_ptr)
    row = -1
    for first in range(0, num_rows, AT_ONCE):
        r = first + tl.arange(0, AT_ONCE)
        start = tl.load(starts_ptr + r, mask=r < num_rows, other=0) - base
        row += tl.sum(((start // BLOCK_M + r <= tile) & (r < num_rows)).to(tl.int32), 0)
    return row


@triton.jit
def place_tile(tile, starts_ptr, num_rows, BLOCK_M: tl.constexpr, AT_ONCE: tl.constexpr):
    """Return the row that owns a tile, where its queries start, how many it has, and which is the tile's first."""
    row = find_row(tile, starts_ptr, num_rows, BLOCK_M, AT_ONCE)
    start = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - start
    first = (tile - ((start - tl.load(starts_ptr)) // BLOCK_M + row)) * BLOCK_M
    return row, start, count, first


@triton.jit
def _load_tile(
    k_ref, v_ref, table_ptr, kv_head, start, context, block_stride, token_stride, head_stride,
    MASKED: tl.constexpr, BULK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return K^T [HEAD_DIM, BLOCK_N] and V [BLOCK_N, HEAD_DIM] of the keys from ``start``.

    What is past the context may be NaN, and 0 * NaN is NaN: with MASKED such values of V are zero.
    """
    offset = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    n = start + offset
    if BLOCK_SIZE % BLOCK_N == 0:  # the tile is in one page
        index = start // BLOCK_SIZE
        if MASKED:
            index = tl.minimum(index, (context - 1) // BLOCK_SIZE)
        page = tl.load(table_ptr + index)
    else:
        page = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < context, other=0)
    if BULK:
        slot = page * BLOCK_SIZE + start % BLOCK_SIZE
        k = tl.trans(k_ref.load([slot, kv_head * HEAD_DIM]))
        v = v_ref.load([slot, kv_head * HEAD_DIM])
        if MASKED:
            v = tl.where((n < context)[:, None], v, 0.0)
    else:
        slots = page.to(tl.int64) * block_stride + (n % BLOCK_SIZE) * token_stride + kv_head * head_stride
        k_ptrs = k_ref + slots[None, :] + d[:, None]
        v_ptrs = v_ref + slots[:, None] + d[None, :]
        if MASKED:
            k = tl.load(k_ptrs, mask=(n < context)[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=(n < context)[:, None], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
    return k, v


@triton.jit
def _first_key(positions, window, CHUNKED: tl.constexpr):
    """Return the first key that a query sees; it may be negative."""
    return positions // window * window if CHUNKED else positions - window + 1


@triton.jit
def _scores(q, k, start, positions, window, MASKED: tl.constexpr, CHUNKED: tl.constexpr, BLOCK_N: tl.constexpr):
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
    if MASKED:
        n = start + tl.arange(0, BLOCK_N)
        visible = (n[None, :] <= positions[:, None]) & (n[None, :] >= _first_key(positions, window, CHUNKED)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def _attend_tiles(
    acc, peak, total, q, k_ref, v_ref, table_ptr, kv_head, begin, end, positions, context, scale, window,
    block_stride, token_stride, head_stride,
    MASKED: tl.constexpr, CHUNKED: tl.constexpr, BULK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Continue the running softmax over the keys [begin, end) of one KV head; ``begin`` is a multiple of BLOCK_N.

    ``k_ref`` and ``v_ref`` are pointers, or with BULK tensor-map descriptors of [slots, J * K].
    """
    for start in range(begin, end, BLOCK_N):
        k, v = _load_tile(
            k_ref, v_ref, table_ptr, kv_head, start, context, block_stride, token_stride, head_stride,
            MASKED, BULK, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip
        scores = _scores(q, k, start, positions, window, MASKED, CHUNKED, BLOCK_N)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        # A step may hide all of its keys from a query (window): then the peak stays -inf, and exp2 must not see NaN.
        known = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        shrink = tl.exp2(peak - known)
        weights = tl.exp2(scores * scale - known[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["num_rows", "window", "table_stride"])
def _prefill_kernel(
    q_ptr, k_ref, v_ref, tables_ptr, lens_ptr, starts_ptr, out_ptr, sinks_ptr,
    num_rows, scale, v_scale, window,
    table_stride, q_stride, out_stride, block_stride, token_stride, head_stride,
    WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, BULK: tl.constexpr, FP8: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    wait_for_inputs(OVERLAP)
    row, start, count, first = place_tile(tile, starts_ptr, num_rows, BLOCK_M, AT_ONCE)
    if first >= count:
        return

    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    tokens = (start + tl.minimum(m, count - 1)).to(tl.int64)
    q = tl.load(q_ptr + tokens[:, None] * q_stride + head * HEAD_DIM + d[None, :])
    if FP8:
        q = q.to(tl.float16)  # e4m3 widens to float16 in one instruction, to bfloat16 in several
    context = tl.load(lens_ptr + row)
    positions = context - count + m
    # Queries past the row's last one compute garbage that is not stored; their keys end where the last one's do.
    end = tl.minimum(context - count + first + BLOCK_M, context)
    first_position = context - count + first
    kv_head = head // GROUP
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if WINDOWED:
        masked_from = tl.maximum(_first_key(first_position, window, CHUNKED), 0) // BLOCK_N * BLOCK_N
    else:
        masked_from = (first_position + 1) // BLOCK_N * BLOCK_N
        acc, peak, total = _attend_tiles(
            acc, peak, total, q, k_ref, v_ref, table_ptr, kv_head, 0, masked_from, positions, context, scale, window,
            block_stride, token_stride, head_stride, False, CHUNKED, BULK, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip
    acc, peak, total = _attend_tiles(
        acc, peak, total, q, k_ref, v_ref, table_ptr, kv_head, masked_from, end, positions, context, scale, window,
        block_stride, token_stride, head_stride, True, CHUNKED, BULK, HEAD_DIM, BLOCK_SIZE, BLOCK_N,
    )  # fmt: skip
    factor = v_scale
    if sinks_ptr is not None:
        shrink, total = with_sinks(sinks_ptr, head + 0 * m, m >= 0, peak, total)
        factor *= shrink
    out = acc * (factor / total)[:, None]
    offsets = (start + m).to(tl.int64)[:, None] * out_stride + head * HEAD_DIM + d[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=(m < count)[:, None])


def choose_tiling(
    dim: int, block_size: int, cache_dtype: torch.dtype, shared: int = HOPPER_SHARED_BYTES
) -> PrefillTiling:
    """Pick tiles by head and page size, and by what fits into ``shared`` bytes of memory (see docs/kernels.md).

    Float32 is for correctness, so its tiles are merely small. Float8 tiles are widened in registers, so no cap there.
    """
    if shared < HOPPER_SHARED_BYTES:
        return _small_tiling(dim, cache_dtype)
    if cache_dtype.itemsize > 2:
        return PrefillTiling(32, 16, 4, 2)
    if dim <= 64:
        return PrefillTiling(64, 64, 4, 3)
    if dim > 256:
        return PrefillTiling(64, 32, 8, 2)
    if dim > 128:
        return PrefillTiling(128, 64, 8, 2) if block_size % 64 == 0 else PrefillTiling(64, 32, 4, 3)
    if cache_dtype.itemsize == 1:
        return PrefillTiling(64, 64, 4, 2)
    return PrefillTiling(128, 64, 8, 2, max_registers=128) if block_size % 64 == 0 else PrefillTiling(128, 128, 8, 3)


def _small_tiling(dim: int, cache_dtype: torch.dtype) -> PrefillTiling:
    """Return tiles for GPUs before Hopper and small ones after it: none takes 99 KiB, and none spills registers.

    Those before Hopper have no tensor maps: what stands in for them takes many registers.
    """
    if cache_dtype.itemsize > 2:
        return PrefillTiling(16 if dim > 256 else 32, 16, 8 if dim > 128 else 4, 2, bulk=False)
    if dim <= 64:
        return PrefillTiling(64, 64, 4, 3, bulk=False)
    if dim <= 128:
        return PrefillTiling(128, 64, 8, 2, bulk=False)
    return PrefillTiling(32, 32, 8, 2, bulk=False) if dim > 256 else PrefillTiling(64, 32, 8, 3, bulk=False)


def _slot_rows(cache_NBJK: Tensor, block_n: int) -> TensorDescriptor:
    """Describe the cache as a matrix with a row per slot, read in tiles of one head's keys."""
    slots_by_heads = cache_NBJK.flatten(2).flatten(0, 1)
    return TensorDescriptor.from_tensor(slots_by_heads, [block_n, cache_NBJK.shape[3]])


def prefill_attention(
    q_THK: Tensor,
    cache: PagedCache,
    query_starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
    in_chunks: bool = False,
    sinks_H: Tensor | None = None,
    tiling: PrefillTiling | None = None,
    out_THK: Tensor | None = None,
) -> Tensor:
    """Attend from the last tokens of each row (already in the cache) to the row's context before and including them.

    Row r's queries are ``q_THK[query_starts[r]:query_starts[r + 1]]``, int32 [R + 1]; the first start need not be 0, so
    that a mixed batch can leave its one-token rows to `decode_attention`. Only those queries are written. ``window``,
    ``in_chunks``, ``sinks_H`` and K are as in `decode_attention`.
    """
    tokens, num_q, dim = q_THK.shape
    rows, device = cache.lens_R.shape[0], q_THK.device
    if out_THK is None:
        out_THK = torch.empty(tokens, num_q, dim, dtype=q_THK.dtype, device=device)
    k, v, block_size = cache.k_NBJK, cache.v_NBJK, cache.block_size
    tiling = tiling or choose_tiling(dim, block_size, k.dtype, shared_bytes(device))
    bulk = tiling.bulk and block_size % tiling.block_n == 0 and k.is_contiguous()
    _prefill_kernel[(num_q, ceil_div(tokens, tiling.block_m) + rows)](
        q_THK, *((_slot_rows(x, tiling.block_n) if bulk else x) for x in (k, v)),
        cache.tables_RP, cache.lens_R, query_starts, out_THK, sinks_H,
        rows, scale * cache.k_scale * LOG2_E, cache.v_scale, window or UNLIMITED,
        cache.tables_RP.stride(0), q_THK.stride(0), out_THK.stride(0), *k.stride()[:3],
        window is not None, in_chunks, bulk, cache.is_fp8,
        num_q // cache.num_kv, dim, block_size,
        tiling.block_m, tiling.block_n, ROWS_AT_ONCE, overlaps_launches(device),
        maxnreg=tiling.max_registers,
        **launch_options(device, tiling.num_warps, tiling.num_stages),
    )  # fmt: skip
    return out_THK
