# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Causal attention of prompts over keys and values that are projected from the cached latents first.

A query and a key of DeepSeek's heads have 128 + 64 components and a value has 128. As latents they have 576 and 512, so
each score and each sum of a prompt costs 3.4 times as much there. Decoding has one query for each key, and the
projection of the key would cost more than that. Prompts have many queries for each.

Keys and values of a context are projected a piece at a time, into temporary memory of bounded size, for all heads. A
program goes through the keys of a piece for a tile of queries of one row and head. Between pieces it stores its sums.
"""

# T tokens, R rows, S tokens of a piece, H query heads, C components of a latent, P plain components of a query,
# K rotated ones, V value dim, X = P + V

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mgpu.worker.kernels.attention.inputs import LOG2_E, LatentProjections
from mgpu.worker.kernels.attention.prefill import ROWS_AT_ONCE, place_tile
from mgpu.worker.kernels.runtime import (
    HOPPER_SHARED_BYTES,
    ceil_div,
    launch_options,
    overlaps_launches,
    power_of_2,
    shared_bytes,
    wait_for_inputs,
)


class ContextPiece(NamedTuple):
    """Consecutive tokens of each row's context, in the cache."""

    slots_S: Tensor
    """int64: where the rows' tokens lie, row by row."""
    starts: Tensor
    """int32 [R + 1]: the tokens of each row in ``slots_S``."""
    first: int
    """The position of the first token of each row that has any."""


class PromptRows(NamedTuple):
    """The rows of prompts, on the device."""

    lens_R: Tensor
    """int32: tokens of each in the cache."""
    starts: Tensor
    """int32 [R + 1]: the queries of each."""
    pieces: tuple[ContextPiece, ...]


@dataclass(frozen=True, slots=True)
class LatentTiling:
    """Queries and keys that a program takes per step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    bulk: bool = True
    """Load keys and values through tensor maps where they can be."""


def plan_pieces(tables_RP: Tensor, lens: list[int], block_size: int, most_tokens: int) -> tuple[ContextPiece, ...]:
    """Cut contexts into pieces of at most ``most_tokens`` tokens of all rows, and at least one of each."""
    length = max(1, most_tokens // max(1, len(lens)))
    pieces = []
    for first in range(0, max(lens, default=0), length):
        counts = [min(length, max(0, context - first)) for context in lens]
        ends = torch.tensor([0, *counts]).cumsum(0)
        starts = ends.to(tables_RP.device, torch.int32, non_blocking=True)
        counts_R = starts.diff().long()
        rows_S = torch.repeat_interleave(counts_R, output_size=sum(counts))
        places_S = torch.arange(first, first + sum(counts), device=tables_RP.device) - starts.long()[rows_S]
        slots_S = tables_RP[rows_S, places_S // block_size].long() * block_size + places_S % block_size
        pieces.append(ContextPiece(slots_S, starts, first))
    return tuple(pieces)


@triton.jit
def _load_rows(ref, row, column, n, exists, stride, COLUMNS: tl.constexpr, PAD: tl.constexpr, BULK: tl.constexpr):
    """Return [BLOCK_N, PAD] of a matrix from ``row`` and ``column`` on."""
    if BULK:
        tile = ref.load([row, column])
    else:
        d = tl.arange(0, PAD)
        mask = exists[:, None] & (d < COLUMNS)[None, :]
        tile = tl.load(ref + (row + n).to(tl.int64)[:, None] * stride + column + d[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _attend(
    acc, peak, total, q, turned, kv_ref, keys_ref, values_ref, row, begin, end, count, places, head, scale,
    kv_stride, latents_stride,
    MASKED: tl.constexpr, BULK: tl.constexpr, RANK: tl.constexpr, PLAIN: tl.constexpr, PLAIN_PAD: tl.constexpr,
    ROTATED: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Continue the running softmax over keys [begin, end) of a row of the piece; ``places``: the last each query sees.

    ``row`` is the row's first token of the piece, and ``count`` is how many it has there.
    """
    offset = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        n = start + offset
        exists = n < count
        column = head * (PLAIN + VALUE)
        k = _load_rows(kv_ref, row + start, column, offset, exists, kv_stride, PLAIN, PLAIN_PAD, BULK)
        key = _load_rows(keys_ref, row + start, RANK, offset, exists, latents_stride, ROTATED, ROTATED, BULK)
        v = _load_rows(values_ref, row + start, column + PLAIN, offset, exists, kv_stride, VALUE, VALUE_PAD, BULK)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(key), scores, input_precision="ieee") * scale
        if MASKED:
            v = tl.where(exists[:, None], v, 0.0)  # those of another row may be NaN
            scores = tl.where(exists[None, :] & (n[None, :] <= places[:, None]), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["num_rows", "first_position", "is_first", "is_last"])
def _latent_prefill_kernel(
    q_ptr, rotated_ptr, kv_ref, keys_ref, values_ref, lens_ptr, starts_ptr, piece_ptr, out_ptr, sums_ptr, stats_ptr,
    num_rows, scale, first_position, is_first, is_last,
    q_token_stride, q_head_stride, rotated_token_stride, rotated_head_stride, kv_stride, latents_stride,
    BULK: tl.constexpr, RANK: tl.constexpr, PLAIN: tl.constexpr, PLAIN_PAD: tl.constexpr, ROTATED: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    wait_for_inputs(OVERLAP)
    row, start, count, first = place_tile(tile, starts_ptr, num_rows, BLOCK_M, AT_ONCE)
    if first >= count:
        return

    m = first + tl.arange(0, BLOCK_M)
    tokens = (start + tl.minimum(m, count - 1)).to(tl.int64)
    p, k, value = tl.arange(0, PLAIN_PAD), tl.arange(0, ROTATED), tl.arange(0, VALUE_PAD)
    q_ptrs = q_ptr + tokens[:, None] * q_token_stride + head * q_head_stride + p[None, :]
    q = tl.load(q_ptrs, mask=(p < PLAIN)[None, :] & (m >= 0)[:, None], other=0.0)
    turned = tl.load(rotated_ptr + tokens[:, None] * rotated_token_stride + head * rotated_head_stride + k[None, :])
    places = tl.load(lens_ptr + row) - count + m - first_position
    piece_row = tl.load(piece_ptr + row)
    held = tl.load(piece_ptr + row + 1) - piece_row
    first_place = tl.load(lens_ptr + row) - count + first - first_position
    end = tl.minimum(first_place + BLOCK_M, held)
    masked_from = tl.maximum(tl.minimum(first_place + 1, held), 0) // BLOCK_N * BLOCK_N

    places_out = (tokens * tl.num_programs(0) + head)[:, None] * VALUE + value[None, :]
    mask = (m < count)[:, None] & (value < VALUE)[None, :]
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    stat_ptrs = stats_ptr
    if sums_ptr is not None:
        stat_ptrs = stats_ptr + (tokens * tl.num_programs(0) + head) * 2
        if is_first == 0:
            acc = tl.load(sums_ptr + places_out, mask=mask, other=0.0)
            peak, total = tl.load(stat_ptrs), tl.load(stat_ptrs + 1)
    acc, peak, total = _attend(
        acc, peak, total, q, turned, kv_ref, keys_ref, values_ref, piece_row, 0, masked_from, held, places, head,
        scale, kv_stride, latents_stride,
        False, BULK, RANK, PLAIN, PLAIN_PAD, ROTATED, VALUE, VALUE_PAD, BLOCK_N,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, q, turned, kv_ref, keys_ref, values_ref, piece_row, masked_from, end, held, places, head,
        scale, kv_stride, latents_stride,
        True, BULK, RANK, PLAIN, PLAIN_PAD, ROTATED, VALUE, VALUE_PAD, BLOCK_N,
    )  # fmt: skip
    if sums_ptr is not None:  # noqa: SIM102 - compile-time condition
        if is_last == 0:
            tl.store(sums_ptr + places_out, acc, mask=mask)
            tl.store(stat_ptrs, peak, mask=m < count)
            tl.store(stat_ptrs + 1, total, mask=m < count)
    out = acc / total[:, None]
    tl.store(out_ptr + places_out, out.to(out_ptr.dtype.element_ty), mask=mask & (is_last != 0))


def choose_tiling(dtype: torch.dtype, shared: int = HOPPER_SHARED_BYTES) -> LatentTiling:
    """Pick tiles that fit into ``shared`` bytes. Float32 is for correctness, so its tiles are merely small.

    GPUs before Hopper have no tensor maps: what stands in for them takes so many registers that others are spilled.
    """
    if shared < HOPPER_SHARED_BYTES:
        is_wide = dtype.itemsize > 2
        return LatentTiling(32, 16, 8, 2, bulk=False) if is_wide else LatentTiling(128, 32, 8, 2, bulk=False)
    return LatentTiling(32, 16, 4, 2) if dtype.itemsize > 2 else LatentTiling(128, 64, 8, 3)


def latent_prefill(
    heads: LatentProjections,
    rotated_THK: Tensor,
    cache_NBK: Tensor,
    rows: PromptRows,
    *,
    scale: float,
    out_THV: Tensor,
    tiling: LatentTiling | None = None,
) -> None:
    """Write what the queries of ``rows`` attend to, values of each head; their latents are in the cache already.

    Other tokens are left out. K is a power of two from 16 on.
    """
    tokens, num_q, plain = heads.q_THP.shape
    rotated, (_, both, rank), value_dim = rotated_THK.shape[2], heads.weight_HXC.shape, heads.value_dim
    device, dtype = rotated_THK.device, rotated_THK.dtype
    tiling = tiling or choose_tiling(dtype, shared_bytes(device))
    plain_pad, value_pad = (max(16, power_of_2(size)) for size in (plain, value_dim))
    # A tile that is wider than its part would read into the next one, and pitches must be multiples of 16 bytes.
    bulk = tiling.bulk and plain_pad == plain and value_pad == value_dim and num_q * both * dtype.itemsize % 16 == 0
    sums = stats = None
    if len(rows.pieces) > 1:
        sums = torch.empty(tokens, num_q, value_dim, dtype=torch.float32, device=device)
        stats = torch.empty(tokens, num_q, 2, dtype=torch.float32, device=device)
    slots_NK, expand_CF = cache_NBK.flatten(0, 1), heads.weight_HXC.flatten(0, 1).T
    for index, piece in enumerate(rows.pieces):
        latents_SK = slots_NK[piece.slots_S]
        kv_SF = latents_SK[:, :rank] @ expand_CF
        refs: tuple[Tensor | TensorDescriptor, ...] = (kv_SF, latents_SK, kv_SF)
        if bulk:
            shapes = [tiling.block_n, plain], [tiling.block_n, rotated], [tiling.block_n, value_dim]
            pairs = zip(refs, shapes, strict=True)
            refs = tuple(TensorDescriptor.from_tensor(each, shape) for each, shape in pairs)
        _latent_prefill_kernel[(num_q, ceil_div(tokens, tiling.block_m) + len(rows.lens_R))](
            heads.q_THP, rotated_THK, *refs, rows.lens_R, rows.starts, piece.starts, out_THV, sums, stats,
            len(rows.lens_R), scale * LOG2_E, piece.first, int(index == 0), int(index == len(rows.pieces) - 1),
            *heads.q_THP.stride()[:2], *rotated_THK.stride()[:2], kv_SF.stride(0), latents_SK.stride(0),
            bulk, rank, plain, plain_pad, rotated, value_dim, value_pad,
            tiling.block_m, tiling.block_n, ROWS_AT_ONCE, overlaps_launches(device),
            **launch_options(device, tiling.num_warps, tiling.num_stages),
        )  # fmt: skip
