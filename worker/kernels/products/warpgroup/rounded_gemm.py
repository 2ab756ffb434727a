# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of float8 rows with words of eight codes on Hopper: weights are rounded to float8 in registers (`rounded`).

Scales are part of the weights, so the tensor core adds up all of K, with its fast sums, as the library's products of
float8 do. A program has two warpgroups that multiply, half of a tile's outputs each, and a warp that fills the ring of
words and activations through tensor maps. No barrier joins the three: a slot is full when its bytes have come, and
empty when both warpgroups have used it. While the tensor core multiplies a step, the warpgroup rounds the next.
"""

# M rows of activations, N output channels, K input channels

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mgpu.worker.kernels.products.warpgroup.blocks import kind_of, stored_factors
from mgpu.worker.kernels.products.warpgroup.codes import STEP, X_TILES
from mgpu.worker.kernels.products.warpgroup.parts import add_parts, fewest_steps, place, share
from mgpu.worker.kernels.products.warpgroup.rounded import (
    ROUNDED_BITS,
    layouts,
    load_stored,
    middle_of,
    pairs_of,
    round_words,
    spread_runs,
)
from mgpu.worker.kernels.products.warpgroup.tile_end import let_next_start, store_tile, wait_for_earlier
from mgpu.worker.kernels.runtime import Workspace, ceil_div, launch_options, overlaps_launches, workspace_for
from mgpu.worker.quantization.float8_rows import Float8Rows, UnscaledProduct
from mgpu.worker.quantization.packing import WORDS, PackedWeight

REGISTERS = gl.constexpr((232, 40))
"""Of a thread that multiplies, and of one that copies."""
END = 3.0
"""Blocks of 256 channels that take as long as the end of a tile."""
RING_BYTES = 222 << 10
"""Shared memory of the ring, beside which results change their layout."""


@dataclass(frozen=True, slots=True)
class RoundedTiling:
    """How a product is cut."""

    block_m: int = 128
    block_n: int = 128
    stages: int = 6


@gluon.jit
def _prefetch(pointers):
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers], gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _copy_words(w_tiles, h_tiles, ws, hs, full, slot, first_n, step):
    tma.async_copy_global_to_shared(w_tiles, [first_n, step * 16], full.index(slot), ws.index(slot))
    if h_tiles is not None:
        tma.async_copy_global_to_shared(h_tiles, [first_n, step * 16], full.index(slot), hs.index(slot))


@gluon.jit
def _copy(
    maps, ring_buffers, barriers, factors, N, groups, blocks, tiles, columns,
    GROUP: gl.constexpr, NESTED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BYTES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Fill the ring."""
    w_tiles, h_tiles, x_tiles = maps
    ws, hs, xs = ring_buffers
    full, empty = barriers
    scale_ptr, added_ptr, super_ptr = factors
    OCTETS: gl.constexpr = scale_ptr.dtype.element_ty.primitive_bitwidth // 8
    RUNS: gl.constexpr = 32 // OCTETS * (GROUP // 32 if GROUP > 32 else 1)  # whose scales lie in 32 bytes
    SECTOR: gl.constexpr = RUNS // 4 if RUNS > 4 else 1
    first, end = share(gl.program_id(0), tiles, blocks), share(gl.program_id(0) + 1, tiles, blocks)
    first_n, _, begin, count = place(first // blocks, first, end, columns, blocks, BLOCK_M, BLOCK_N)
    for stage in gl.static_range(STAGES):  # weights are no other kernel's results
        if stage < count * 2:
            mbarrier.expect(full.index(stage), BYTES)
            _copy_words(w_tiles, h_tiles, ws, hs, full, stage, first_n, begin * 2 + stage)
    if OVERLAP:
        wait_for_earlier()
    ring, begun = 0, gl.minimum(count * 2, STAGES)
    for tile in range(first // blocks, (end + blocks - 1) // blocks):
        first_n, first_m, begin, count = place(tile, first, end, columns, blocks, BLOCK_M, BLOCK_N)
        n = gl.minimum(first_n + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [1], [0])), N - 1)
        for step in range(begin * 2, (begin + count) * 2):
            slot = ring % STAGES
            if GROUP > 0:  # noqa: SIM102 - known while compiling
                if step == begin * 2 or step % SECTOR == 0:
                    ahead = gl.minimum(step + SECTOR, blocks * 2 - 1)
                    if GROUP == 16:
                        places = n * (groups // 2) + ahead * 4
                    else:
                        places = n * groups + gl.minimum(ahead * 128 // GROUP, groups - 1)
                    _prefetch(scale_ptr + places)
                    if added_ptr is not None:
                        _prefetch(added_ptr + places)
                    if NESTED:
                        _prefetch(super_ptr + n * blocks + ahead // 2)
            if ring >= STAGES:
                mbarrier.wait(empty.index(slot), (ring // STAGES - 1) & 1)
            if ring >= begun:
                mbarrier.expect(full.index(slot), BYTES)
                _copy_words(w_tiles, h_tiles, ws, hs, full, slot, first_n, step)
            tma.async_copy_global_to_shared(x_tiles, [first_m, step * 128], full.index(slot), xs.index(slot))
            ring += 1


@gluon.jit
def _round(
    ws, hs, slot, both, second, HALF: gl.constexpr, BITS: gl.constexpr, HAS_HIGH: gl.constexpr, TWO: gl.constexpr,
    HAS_OFFSET: gl.constexpr, MIDDLE: gl.constexpr, ROWS: gl.constexpr, WORDS: gl.constexpr, RUNS: gl.constexpr,
    OPERAND: gl.constexpr,
):  # fmt: skip
    """Return the weights of a step as an operand."""
    both = spread_runs(both, ROWS, WORDS, RUNS)
    if TWO and HAS_OFFSET:
        second = spread_runs(second, ROWS, WORDS, RUNS)
    words = ws.index(slot).slice(HALF * ROWS, ROWS, dim=0).load(WORDS).to(gl.int32)
    high = words
    if HAS_HIGH:
        high = hs.index(slot).slice(HALF * ROWS, ROWS, dim=0).load(WORDS).to(gl.int32)
    return round_words(words, high, both, second, BITS, HAS_HIGH, TWO, HAS_OFFSET, MIDDLE, ROWS, OPERAND)


@gluon.jit
def _multiply(
    HALF: gl.constexpr, ring_buffers, barriers, factors, power_ptr, outputs,
    M, N, groups, blocks, tiles, columns, y_stride,
    KIND: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSET: gl.constexpr, HAS_ZERO: gl.constexpr,
    NESTED: gl.constexpr, MIDDLE: gl.constexpr, HAS_HIGH: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    WORDS: gl.constexpr, RUNS: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """Multiply half of a tile's outputs."""
    ROWS: gl.constexpr = BLOCK_N // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    TWO: gl.constexpr = GROUP == 16
    ws, hs, xs = ring_buffers
    full, empty = barriers
    scale_ptr, added_ptr, super_ptr = factors
    y_ptr, partial_ptr, counter_ptr = outputs
    ring = 0
    first, end = share(gl.program_id(0), tiles, blocks), share(gl.program_id(0) + 1, tiles, blocks)
    for tile in range(first // blocks, (end + blocks - 1) // blocks):
        first_n, first_m, begin, count = place(tile, first, end, columns, blocks, BLOCK_M, BLOCK_N)
        first_n += HALF * ROWS
        row = gl.expand_dims(gl.minimum(first_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OWN)), N - 1), 1)
        power = gl.load(power_ptr)
        scale, added, factor = load_stored(
            scale_ptr, added_ptr, super_ptr, row, gl.minimum(begin, blocks - 1) * 2, groups, blocks, GROUP, NESTED, OWN
        )
        next_scale, next_added, next_factor = load_stored(
            scale_ptr, added_ptr, super_ptr, row, gl.minimum(begin, blocks - 1) * 2 + 1, groups, blocks, GROUP, NESTED,
            OWN,
        )  # fmt: skip
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, SUMS)
        for block in range(begin, begin + count):
            slot, next_slot = ring % STAGES, (ring + 1) % STAGES
            ring += 2
            mbarrier.wait(full.index(slot), (ring - 2) // STAGES & 1)
            mbarrier.wait(full.index(next_slot), (ring - 1) // STAGES & 1)
            both, second = pairs_of(
                scale, added, factor, power, KIND, BITS, GROUP, HAS_OFFSET, HAS_ZERO, NESTED, MIDDLE
            )
            codes = _round(
                ws, hs, slot, both, second, HALF, BITS, HAS_HIGH, TWO, HAS_OFFSET, MIDDLE, ROWS, WORDS, RUNS, OPERAND
            )
            acc = warpgroup_mma(codes, xs.index(slot).permute((1, 0)), acc, is_async=True)
            both, second = pairs_of(
                next_scale, next_added, next_factor, power, KIND, BITS, GROUP, HAS_OFFSET, HAS_ZERO, NESTED, MIDDLE
            )
            step = gl.minimum(block + 1, blocks - 1) * 2
            scale, added, factor = load_stored(
                scale_ptr, added_ptr, super_ptr, row, step, groups, blocks, GROUP, NESTED, OWN
            )
            next_scale, next_added, next_factor = load_stored(
                scale_ptr, added_ptr, super_ptr, row, step + 1, groups, blocks, GROUP, NESTED, OWN
            )
            codes = _round(
                ws, hs, next_slot, both, second, HALF, BITS, HAS_HIGH, TWO, HAS_OFFSET, MIDDLE, ROWS, WORDS, RUNS,
                OPERAND,
            )  # fmt: skip
            acc = warpgroup_mma(codes, xs.index(next_slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            mbarrier.arrive(empty.index(next_slot), count=1)
        is_done = 1
        if count < blocks:
            acc, is_done = add_parts(acc, partial_ptr, counter_ptr, tile, first // blocks, tiles, blocks, HALF, SUMS)
        if is_done:
            store_tile(acc / power, None, y_ptr, first_n, first_m, M, N, y_stride, SUMS, 4, False)


@gluon.jit(do_not_specialize=["M", "groups", "blocks", "tiles", "columns"])
def _rounded_gemm_kernel(
    w_tiles, h_tiles, x_tiles, scale_ptr, added_ptr, super_ptr, power_ptr,
    y_ptr, partial_ptr, counter_ptr, M, N, groups, blocks, tiles, columns, y_stride,
    KIND: gl.constexpr, BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSET: gl.constexpr, HAS_ZERO: gl.constexpr,
    MIDDLE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
    WORDS: gl.constexpr, RUNS: gl.constexpr, OWN: gl.constexpr,
    OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    NESTED: gl.constexpr = super_ptr is not None
    ws = gl.allocate_shared_memory(w_tiles.dtype, [STAGES, BLOCK_N, 16], w_tiles.layout)
    hs = ws
    if h_tiles is not None:
        hs = gl.allocate_shared_memory(h_tiles.dtype, [STAGES, BLOCK_N, 16], h_tiles.layout)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, 128], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    if OVERLAP:
        let_next_start()
    ring_buffers, barriers, maps = (ws, hs, xs), (full, empty), (w_tiles, h_tiles, x_tiles)
    factors, outputs = (scale_ptr, added_ptr, super_ptr), (y_ptr, partial_ptr, counter_ptr)
    gl.warp_specialize(
        [
            (_multiply, (
                0, ring_buffers, barriers, factors, power_ptr, outputs,
                M, N, groups, blocks, tiles, columns, y_stride,
                KIND, BITS, GROUP, HAS_OFFSET, HAS_ZERO, NESTED, MIDDLE, h_tiles is not None, BLOCK_M, BLOCK_N, STAGES,
                WORDS, RUNS, OWN,
            )),
            (_multiply, (
                1, ring_buffers, barriers, factors, power_ptr, outputs,
                M, N, groups, blocks, tiles, columns, y_stride,
                KIND, BITS, GROUP, HAS_OFFSET, HAS_ZERO, NESTED, MIDDLE, h_tiles is not None, BLOCK_M, BLOCK_N, STAGES,
                WORDS, RUNS, OWN,
            )),
            (_copy, (
                maps, ring_buffers, barriers, factors, N, groups, blocks, tiles, columns,
                GROUP, NESTED, BLOCK_M, BLOCK_N, STAGES, BYTES, OVERLAP,
            )),
        ],
        [4, 1],
        [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


def _word_map(words: Tensor, block_n: int) -> TensorDescriptor:
    """Return the tensor map of words or of upper bits, 16 of a row at once."""
    octets = words.element_size()
    swizzle = {4: 64, 2: 32, 1: 0}[octets]
    return TensorDescriptor.from_tensor(
        words, [block_n, 16], gl.NVMMASharedLayout(swizzle, 8 * octets, rank=2)
    )  # fmt: skip


def choose_tiling(rows: int, n: int, k: int, octets: int) -> RoundedTiling:
    """Pick tiles as measured on an H200 (docs/kernels.md), for so many bytes of a word and its upper bits."""
    is_large = n * k > 1 << 25 or (rows > 256 and n > 4096)
    block_m = 256 if is_large and (rows - 1) % 256 >= 128 else 128  # few rows of the last tile are none
    return RoundedTiling(block_m, 128, min(8, RING_BYTES // (block_m * STEP + 128 * 16 * octets)))


def rounded_gemm(
    rows: Float8Rows,
    weight: PackedWeight,
    *,
    tiling: RoundedTiling | None = None,
    programs: int | None = None,
    workspace: Workspace | None = None,
) -> UnscaledProduct:
    """Multiply by the transpose of the weight, which has a ``power``, rounded to float8; in bfloat16."""
    (count, places), (n, words_per_row) = rows.values.shape, weight.words.shape
    octets = weight.words.element_size() + (0 if weight.high is None else weight.high.element_size())
    tiling = tiling or choose_tiling(count, n, places, octets)
    block_m, block_n = tiling.block_m, tiling.block_n
    columns, blocks = ceil_div(n, block_n), words_per_row // WORDS
    tiles = columns * ceil_div(count, block_m)
    programs = programs or fewest_steps(tiles, blocks, END)
    out_MN = torch.empty(count, n, dtype=torch.bfloat16, device=rows.values.device)
    if workspace is None:
        workspace = workspace_for(out_MN.device, programs * 2 * block_n * block_m, tiles * 2)
    scales, supers = stored_factors(weight)
    has_offset = weight.offsets is not None or weight.kind == "int2"
    _rounded_gemm_kernel[(programs,)](
        _word_map(weight.words, block_n),
        None if weight.high is None else _word_map(weight.high, block_n),
        TensorDescriptor.from_tensor(rows.values, [block_m, STEP], X_TILES),
        scales, weight.zeros if weight.offsets is None else weight.offsets, supers, weight.power,
        out_MN, workspace.partials, workspace.counters,
        count, n, weight.scales.shape[1], blocks, tiles, columns, out_MN.stride(0),
        kind_of(weight), ROUNDED_BITS[weight.kind], weight.group, has_offset, weight.zeros is not None,
        middle_of(weight.kind, has_offset), block_m, block_n, tiling.stages, block_m * STEP + block_n * 16 * octets,
        *layouts(block_n // 2), overlaps_launches(out_MN.device), **launch_options(out_MN.device, 4, 1),
    )  # fmt: skip
    return UnscaledProduct(out_MN, rows.scale_T)
