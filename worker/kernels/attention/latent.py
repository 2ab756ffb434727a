# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Attention of single tokens over a paged cache of latents, split along the context.

All query heads of a rank attend to the same latents, so up to 16 of them are one operand of a product of tiles, and a
latent is read once for them. The values are the first components of what is read for the scores. A program takes one
tile of heads of one token and one stretch of its context, as in `decode_attention`, whose merging it shares.

Rows that decode have one token each. In a prompt every token is a row of its own: it sees the context up to itself.
"""

# T tokens, R rows, H query heads, C components without position, K rotated ones, N blocks, B tokens per block, P pages

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.attention.attend import combine
from mgpu.worker.kernels.attention.inputs import LOG2_E, LatentRows
from mgpu.worker.kernels.runtime import (
    HOPPER_SHARED_BYTES,
    HOPPER_SMS,
    Workspace,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
    shared_bytes,
    wait_for_inputs,
)

MOST_HEADS = 16
"""Of one tile. Their sums fill the registers of a program where latents have 512 components."""


_LARGE_TILES_BYTES = 180 << 10
"""Shared memory from which on two tiles of 64 of DeepSeek's latents fit."""


@dataclass(frozen=True, slots=True)
class LatentRowTiling:
    """How the context of a row is cut."""

    block_n: int
    """Tokens per step of a program."""
    stretch: int
    """Fewest tokens worth a program of their own, a multiple of ``block_n``."""
    num_warps: int = 8
    num_stages: int = 2


@triton.jit(do_not_specialize=["table_stride", "stats_offset", "splits"])
def _latent_kernel(
    q_ptr, rotated_ptr, cache_ptr, tables_ptr, lens_ptr, owners_ptr, out_ptr, partial_ptr, counter_ptr,
    scale, table_stride, q_token_stride, q_head_stride, rotated_token_stride, rotated_head_stride, block_stride,
    slot_stride, stats_offset, splits,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, STRETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.program_id(2)
    groups = tl.num_programs(0)
    wait_for_inputs(OVERLAP)
    row = token
    context = tl.load(lens_ptr + token).to(tl.int32)
    if owners_ptr is not None:  # tokens of prompts: what is loaded is a position
        row = tl.load(owners_ptr + token)
        context += 1
        if row < 0:
            return
    # A row without context (padding of a graph) has one stretch, empty, and yields zeros.
    stretch = tl.maximum(tl.cdiv(tl.cdiv(context, splits), BLOCK_N) * BLOCK_N, STRETCH)
    count = tl.maximum(tl.cdiv(context, stretch), 1)
    if split >= count:
        return

    g = tl.arange(0, GROUP_PAD)
    real = (g < GROUP)[:, None]
    c = tl.arange(0, RANK)
    k = tl.arange(0, ROTATED)
    heads = (group * GROUP + g).to(tl.int64)[:, None]
    token_64 = token.to(tl.int64)
    q = tl.load(q_ptr + token_64 * q_token_stride + heads * q_head_stride + c[None, :], mask=real, other=0.0)
    turned_ptr = rotated_ptr + token_64 * rotated_token_stride + heads * rotated_head_stride + k[None, :]
    turned = tl.load(turned_ptr, mask=real, other=0.0)
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    begin = split * stretch
    end = tl.minimum(begin + stretch, context)
    acc = tl.zeros([GROUP_PAD, RANK], tl.float32)
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = n < end
        page = tl.load(table_ptr + n // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        slots = (page * block_stride + (n % BLOCK_SIZE) * slot_stride)[:, None]
        # Masked, not merely ignored: what lies past the context may be NaN, and 0 * NaN is NaN.
        latents = tl.load(cache_ptr + slots + c[None, :], mask=valid[:, None], other=0.0)
        keys = tl.load(cache_ptr + slots + RANK + k[None, :], mask=valid[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(latents), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(keys), scores, input_precision="ieee") * scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), latents, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak

    pair = token * groups + group
    tile = g[:, None] * RANK + c[None, :]
    out_ptr += pair.to(tl.int64) * (GROUP * RANK)
    if count == 1:
        out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=real)
    else:
        slot = pair * splits + split
        stat_ptr = partial_ptr + stats_offset
        tl.store(partial_ptr + slot.to(tl.int64) * (GROUP * RANK) + tile, acc, mask=real)
        tl.store(stat_ptr + (slot * GROUP + g) * 2, peak, mask=g < GROUP)
        tl.store(stat_ptr + (slot * GROUP + g) * 2 + 1, total, mask=g < GROUP)
        tl.debug_barrier()  # all threads' stores precede the release below
        arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel")
        if arrived == count - 1:
            first_slot = pair * splits
            combine(
                out_ptr, partial_ptr + first_slot.to(tl.int64) * (GROUP * RANK), stat_ptr + first_slot * GROUP * 2,
                count, 1.0, GROUP, HEADS, RANK, 1,
            )  # fmt: skip
            tl.store(counter_ptr + pair, 0)


def heads_of_tile(num_q: int) -> int:
    """Return how many heads one program takes: the most that divide them."""
    return max(group for group in range(1, MOST_HEADS + 1) if num_q % group == 0)


def choose_tiling(dtype: torch.dtype, shared: int = HOPPER_SHARED_BYTES) -> LatentRowTiling:
    """Pick tiles that fit into ``shared`` bytes. Float32 is for correctness, so its tiles are merely small."""
    if dtype.itemsize > 2:
        return LatentRowTiling(16, 128, num_warps=4)
    return LatentRowTiling(64, 64) if shared >= _LARGE_TILES_BYTES else LatentRowTiling(32, 64)


def choose_splits(pairs: int) -> int:
    """Return the most programs of one tile of heads, by the size of the batch alone, so that graphs stay valid."""
    splits = 1
    while splits < 64 and pairs * splits * 2 <= HOPPER_SMS:
        splits *= 2
    return splits


def latent_attention(
    q_THC: Tensor,
    rotated_THK: Tensor,
    cache_NBK: Tensor,
    rows: LatentRows,
    *,
    scale: float,
    out_THC: Tensor,
    splits: int | None = None,
    tiling: LatentRowTiling | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Write the sums of latents that the tokens of ``rows`` attend to, which are in the cache already.

    Queries are in two parts, each with any strides but contiguous components; a latent is C + K components. Tokens that
    are of no row are left out, and rows with a context of 0 yield zeros. C and K are powers of two from 16 on.
    """
    tokens = len(rows.lens)
    num_q, rank, rotated = *q_THC.shape[1:], rotated_THK.shape[2]
    group, device = heads_of_tile(num_q), q_THC.device
    pairs = tokens * (num_q // group)
    splits = splits or choose_splits(pairs)
    workspace = workspace or default_workspace(device)
    slots = pairs * splits
    if splits > 1:
        workspace.require(slots * group * (rank + 2), pairs)
    tiling = tiling or choose_tiling(cache_NBK.dtype, shared_bytes(device))
    _latent_kernel[(num_q // group, splits, tokens)](
        q_THC, rotated_THK, cache_NBK, rows.tables_RP, rows.lens, rows.owners_T, out_THC, workspace.partials,
        workspace.counters,
        scale * LOG2_E, rows.tables_RP.stride(0), *q_THC.stride()[:2], *rotated_THK.stride()[:2],
        *cache_NBK.stride()[:2], slots * group * rank, splits,
        group, max(16, power_of_2(group)), power_of_2(group), rank, rotated,
        cache_NBK.shape[1], tiling.block_n, tiling.stretch, overlaps_launches(device),
        **launch_options(device, tiling.num_warps, tiling.num_stages),
    )  # fmt: skip
