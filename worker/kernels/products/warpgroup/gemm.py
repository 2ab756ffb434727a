# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of rows with 4-bit weights on Hopper, where a warpgroup widens the next weights while it multiplies.

The weights are the tall operand, read from registers; the activations are the narrow one, in shared memory. One tile
has all rows of activations up to 256, so that no weight is widened twice. While the tensor core multiplies two parts
of a block of words, the next two are widened; `quantized_gemm`, in plain Triton, must wait in between. A ring of tiles
of words and one of activations are filled ahead by asynchronous copies.

The loop has quarters of a block: a byte of each word, 64 of 256 inputs. A step, the unit of copies and barriers, is
one, two or four of them. Its theory, for D = STAGES - 2 steps ahead: before step s, the copies that were begun before
step s - D + 1 are done. Those are the activations of step s, and, since words are begun earlier than activations, the
words that are read at the end of step s for the next block. The products of a quarter are waited for in the next one,
so that the tensor core has work during barriers. At the barrier of step s, those of step s - 2 are done in all warps,
and its slot is filled again; a slot of words was read before an earlier barrier.
"""

# M rows of activations, N output channels, K input channels

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from mgpu.worker.kernels.layers.arrange import arrange_rows
from mgpu.worker.kernels.products.warpgroup.blocks import (
    BLOCKS,
    CODE_BITS,
    FACTOR_TILES,
    copy_of,
    factor_layout,
    kind_of,
    load_block_factors,
    load_stored,
    store_factors,
    stored_factors,
    tiles_of,
    widen_codes,
)
from mgpu.worker.kernels.products.warpgroup.tile_end import add_splits, let_next_start, wait_for_earlier
from mgpu.worker.kernels.products.warpgroup.widen import SUM_FACTOR, load_factors, widen, word_layouts
from mgpu.worker.kernels.runtime import (
    Workspace,
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
)
from mgpu.worker.quantization.packing import WORDS, PackedWeight

MAX_ROWS = 256
"""Rows of the largest tile."""
FEW_ROWS = 16
"""Rows up to which activations are copied in runs of 4 channels, so that no kernel has to arrange them first."""


@dataclass(frozen=True, slots=True)
class WarpgroupTiling:
    """How a product is cut."""

    block_n: int
    """Outputs of a tile: 16 a warp, or twice as many."""
    block_m: int
    """Rows of activations of a tile."""
    splits: int
    """Programs among which K is divided."""
    num_warps: int
    stages: int
    """Steps in the ring of activations."""
    quarters: int
    """Quarters of a block of words per step: 1, 2 or 4."""


@gluon.jit
def _copy_rows(xs, x_ptrs, mask, slot, step, QUARTERS: gl.constexpr, ARRANGED: gl.constexpr):
    """Begin to copy what a step's quarters are multiplied by: 64 places in a row, or 16 runs of 4 channels."""
    for quarter in gl.static_range(QUARTERS):
        at = step * QUARTERS + quarter
        source = x_ptrs + (at * 64 if ARRANGED else at // 4 * 256 + at % 4 * 8)
        async_copy.async_copy_global_to_shared(xs.index(slot * QUARTERS + quarter), source, mask=mask)


@gluon.jit
def _widen(
    words, upper, first, second, third, fourth,
    BYTE: gl.constexpr, BITS: gl.constexpr, HAS_OFFSET: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    if BITS != 4:
        low, high = widen_codes(words, upper, first, second, third, fourth, BYTE, BITS, HAS_OFFSET, OPERAND)
    else:
        low, high = widen(words, first, second, third, BYTE, OPERAND)
    return low, high


@gluon.jit(do_not_specialize=["M", "groups", "blocks", "blocks_per_split", "row_tiles"])
def _warpgroup_gemm_kernel(
    x_ptr, w_ptr, high_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, groups, blocks, blocks_per_split, row_tiles, x_stride, y_stride,
    KIND: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr,
    SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUARTERS: gl.constexpr,
    ARRANGED: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    HAS_HIGH: gl.constexpr = high_ptr is not None
    HAS_OFFSET: gl.constexpr = BITS == 2 or offset_ptr is not None
    NESTED: gl.constexpr = super_ptr is not None
    STORED: gl.constexpr = factor_layout(num_warps)
    OCTETS: gl.constexpr = 2 if BITS < 4 else 4
    HIGH_OCTETS: gl.constexpr = 2 if BITS == 6 else 1
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    WORD_COPY: gl.constexpr = copy_of(OCTETS, num_warps)
    WIDE_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    NARROW_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [num_warps, 1], [1, 0])
    HIGH_COPY: gl.constexpr = copy_of(HIGH_OCTETS, num_warps)
    ROW_COPY: gl.constexpr = WIDE_COPY if ARRANGED else NARROW_COPY
    AHEAD: gl.constexpr = STAGES - 2
    LOAD_AT: gl.constexpr = 3 if BLOCK_M > 128 else 0  # late where registers are scarce
    WORD_SLOTS: gl.constexpr = STAGES if QUARTERS == 4 else 2
    STEPS: gl.constexpr = 4 // QUARTERS
    tile, split = gl.program_id(0), gl.program_id(1)
    first_n = tile // row_tiles * BLOCK_N
    first_m = tile % row_tiles * BLOCK_M
    begin = split * blocks_per_split
    end = gl.minimum(begin + blocks_per_split, blocks)
    ws = gl.allocate_shared_memory(w_ptr.dtype.element_ty, [WORD_SLOTS, BLOCK_N, 32], tiles_of(OCTETS))
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * QUARTERS, BLOCK_M, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    copied_n = gl.minimum(first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, WORD_COPY)), N - 1)
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, WORD_COPY))
    w_ptrs = w_ptr + gl.expand_dims(copied_n.to(gl.int64) * (blocks * 32), 1) + gl.expand_dims(word, 0)
    copied_m = first_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ROW_COPY))
    place = gl.arange(0, 64, layout=gl.SliceLayout(0, ROW_COPY))
    if not ARRANGED:  # where the channels of two parts are
        place = gl.max_contiguous(gl.multiple_of(place // 32 * 4 + place % 32 // 4 * 32 + place % 4, [4]), [4])
    x_ptrs = x_ptr + gl.expand_dims(copied_m * x_stride, 1) + gl.expand_dims(place, 0)
    x_mask = gl.expand_dims(copied_m < M, 1)
    first_step, last_step = begin * STEPS, end * STEPS
    if KIND == BLOCKS:
        fs = gl.allocate_shared_memory(gl.int32, [4 if BITS == 2 else 2, BLOCK_N, 8], FACTOR_TILES)
    if HAS_HIGH:
        hs = gl.allocate_shared_memory(high_ptr.dtype.element_ty, [WORD_SLOTS, BLOCK_N, 32], tiles_of(HIGH_OCTETS))
        high_n = gl.minimum(first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, HIGH_COPY)), N - 1)
        high_word = gl.arange(0, 32, layout=gl.SliceLayout(0, HIGH_COPY))
        high_ptrs = high_ptr + gl.expand_dims(high_n.to(gl.int64) * (blocks * 32), 1) + gl.expand_dims(high_word, 0)

    for slot in gl.static_range(WORD_SLOTS):  # weights are no other kernel's results
        if begin + slot < end:
            async_copy.async_copy_global_to_shared(ws.index(slot), w_ptrs + (begin + slot) * 32)
            if HAS_HIGH:
                async_copy.async_copy_global_to_shared(hs.index(slot), high_ptrs + (begin + slot) * 32)
    if KIND == BLOCKS:
        stored = load_stored(scale_ptr, offset_ptr, super_ptr, first_n, N, blocks, begin, BLOCK_N, STORED)
        later = load_stored(scale_ptr, offset_ptr, super_ptr, first_n, N, blocks, begin + 1, BLOCK_N, STORED)
        scale, offset, factor = load_stored(
            scale_ptr, offset_ptr, super_ptr, first_n, N, blocks, begin + 2, BLOCK_N, STORED
        )
        store_factors(fs, 0, stored[0], stored[1], stored[2], BITS, GROUP, HAS_OFFSET, NESTED)
        store_factors(fs, 1, later[0], later[1], later[2], BITS, GROUP, HAS_OFFSET, NESTED)
    if OVERLAP:
        let_next_start()
        wait_for_earlier()
    for step in gl.static_range(AHEAD):
        if first_step + step < last_step:
            _copy_rows(xs, x_ptrs, x_mask, step, first_step + step, QUARTERS, ARRANGED)
        async_copy.commit_group()
    if KIND != BLOCKS:
        first, second, third = load_factors(
            scale_ptr, zero_ptr, first_n, N, groups, begin, KIND, GROUP, BLOCK_N, WORDS, RUNS
        )
        fourth = third
    async_copy.wait_group(AHEAD - 1)
    gl.thread_barrier()
    if KIND == BLOCKS:
        first, second, third, fourth = load_block_factors(fs, 0, BITS, BLOCK_N, WORDS, RUNS)
    words = ws.index(0).load(WORDS)
    upper = hs.index(0).load(WORDS).to(gl.int16) if HAS_HIGH else words
    low, high = _widen(words, upper, first, second, third, fourth, 0, BITS, HAS_OFFSET, OPERAND)
    last_low, last_high = low, high
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    for block in range(begin, end):
        i = block - begin
        for quarter in gl.static_range(4):
            if quarter % QUARTERS == 0:
                async_copy.wait_group(AHEAD - 1)
                fence_async_shared()  # what copies have written is read by the tensor core
                gl.thread_barrier()
                ahead = i * STEPS + quarter // QUARTERS + AHEAD
                if first_step + ahead < last_step:
                    _copy_rows(xs, x_ptrs, x_mask, ahead % STAGES, first_step + ahead, QUARTERS, ARRANGED)
                if quarter == 0:  # noqa: SIM102 - known while compiling
                    if block + WORD_SLOTS < end:
                        source = w_ptrs + (block + WORD_SLOTS) * 32
                        async_copy.async_copy_global_to_shared(ws.index(i % WORD_SLOTS), source)
                        if HAS_HIGH:
                            source = high_ptrs + (block + WORD_SLOTS) * 32
                            async_copy.async_copy_global_to_shared(hs.index(i % WORD_SLOTS), source)
                async_copy.commit_group()
            if quarter == LOAD_AT:  # noqa: SIM102 - known while compiling
                if KIND != BLOCKS:
                    next_first, next_second, next_third = load_factors(
                        scale_ptr, zero_ptr, first_n, N, groups, block + 1, KIND, GROUP, BLOCK_N, WORDS, RUNS
                    )
                    next_fourth = next_third
            x = xs.index((i * 4 + quarter) % (STAGES * QUARTERS)).permute((1, 0))
            acc = warpgroup_mma(low, x.slice(0, 32, dim=0), acc, is_async=True)
            acc = warpgroup_mma(high, x.slice(32, 32, dim=0), acc, is_async=True)
            if quarter == 0:  # noqa: SIM102 - known while compiling
                if KIND == BLOCKS:
                    store_factors(fs, i % 2, scale, offset, factor, BITS, GROUP, HAS_OFFSET, NESTED)
                    scale, offset, factor = load_stored(
                        scale_ptr, offset_ptr, super_ptr, first_n, N, blocks, block + 3, BLOCK_N, STORED
                    )
            if quarter == 3:
                words = ws.index((i + 1) % WORD_SLOTS).load(WORDS)
                if HAS_HIGH:
                    upper = hs.index((i + 1) % WORD_SLOTS).load(WORDS).to(gl.int16)
                if KIND == BLOCKS:
                    first, second, third, fourth = load_block_factors(fs, (i + 1) % 2, BITS, BLOCK_N, WORDS, RUNS)
                else:
                    first, second, third, fourth = next_first, next_second, next_third, next_fourth
            acc, _, _ = warpgroup_mma_wait(2, deps=[acc, last_low, last_high])
            last_low, last_high = low, high
            low, high = _widen(words, upper, first, second, third, fourth, (quarter + 1) % 4, BITS, HAS_OFFSET, OPERAND)

    acc, _, _ = warpgroup_mma_wait(0, deps=[acc, last_low, last_high])
    acc *= SUM_FACTOR
    async_copy.wait_group(0)
    n = first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SUMS))
    m = first_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SUMS))
    is_done = 1
    if SPLITS > 1:
        offsets = gl.expand_dims((n - first_n) * BLOCK_M, 1) + gl.expand_dims(m - first_m, 0)
        acc, is_done = add_splits(acc, partial_ptr, counter_ptr, tile, split, offsets, SPLITS, BLOCK_N * BLOCK_M)
    if is_done:
        if bias_ptr is not None:
            acc += gl.expand_dims(gl.load(bias_ptr + gl.minimum(n, N - 1)).to(gl.float32), 1)
        mask = gl.expand_dims(m < M, 0) & gl.expand_dims(n < N, 1)
        y_ptrs = y_ptr + gl.expand_dims(m * y_stride, 0) + gl.expand_dims(n, 1)
        gl.store(y_ptrs, acc.to(gl.bfloat16), mask=mask)


def choose_tiling(rows: int, n: int, k: int) -> WarpgroupTiling:
    """Pick tiles as measured on an H200 (docs/kernels.md)."""
    block_m, is_wide = min(MAX_ROWS, max(8, power_of_2(rows))), n > 8192
    if rows <= 16:
        return WarpgroupTiling(64, block_m, 1 if is_wide else 4, 4, 3, 4)
    if rows <= 128:
        return WarpgroupTiling(64, block_m, 1 if n > 4096 else 4, 4, 4, 2 if rows <= 64 else 1)
    return WarpgroupTiling(128, block_m, 1 if is_wide else 4 if k > 8192 else 2, 8, 5, 1)


def warpgroup_gemm(
    x_MK: Tensor,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    tiling: WarpgroupTiling | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply rows (bfloat16) by the dequantized weight's transpose, in float32; see `trial.takes_words`."""
    rows, n, words_per_row = len(x_MK), *weight.words.shape
    tiling = tiling or choose_tiling(rows, n, weight.k)
    blocks = words_per_row // WORDS
    out_MN = torch.empty(rows, n, dtype=x_MK.dtype, device=x_MK.device)
    is_even = x_MK.shape[1] == words_per_row * 8 and x_MK.stride(0) % 16 == 0 and x_MK.data_ptr() % 16 == 0
    is_arranged = rows > FEW_ROWS or not is_even
    if is_arranged:
        x_MK = arrange_rows(x_MK, words_per_row * 8)
    row_tiles = ceil_div(rows, tiling.block_m)
    tiles = ceil_div(n, tiling.block_n) * row_tiles
    workspace = workspace or default_workspace(x_MK.device)
    splits = workspace.most_splits(tiling.splits, tiles, tiling.block_n * tiling.block_m)
    scales, supers = stored_factors(weight)
    _warpgroup_gemm_kernel[(tiles, splits)](
        x_MK, weight.words, weight.high, scales, weight.zeros, weight.offsets, supers, bias_N,
        out_MN, workspace.partials, workspace.counters,
        rows, n, weight.scales.shape[1], blocks, ceil_div(blocks, splits), row_tiles,
        x_MK.stride(0), out_MN.stride(0),
        kind_of(weight), CODE_BITS[weight.kind], weight.group, splits, tiling.block_m, tiling.block_n,
        tiling.stages, tiling.quarters, is_arranged, *word_layouts(tiling.block_n, tiling.num_warps),
        overlaps_launches(x_MK.device), **launch_options(x_MK.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_MN
