# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of many rows with packed int8 weights in integers, on Hopper: no weight is widened.

Rows are integers of 16 bits, two bytes each (`integer_rows`). The tensor core multiplies bytes twice as fast as
bfloat16, so both bytes take the time of one product in bfloat16, and weights reach it as they lie in their words. Sums
of bytes are exact; 256 times the sum of the upper ones and that of the lower ones are added in float32.

Two warpgroups have 64 outputs of a tile each. One warp copies ahead for both, through tensor maps, into a ring: also
the first steps of the next tile, while sums are stored. A slot is free when both have done its products, which each
waits for one step later, so that the tensor core has work meanwhile.
"""

# M rows of activations, N output channels, K input channels

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

from mgpu.worker.kernels.products.warpgroup.tile_end import (
    add_splits,
    block_places,
    let_next_start,
    store_tile,
    wait_for_earlier,
)
from mgpu.worker.kernels.runtime import (
    HOPPER_SMS,
    Workspace,
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
)
from mgpu.worker.quantization.integer_rows import IntegerRows
from mgpu.worker.quantization.packing import PackedWeight

BLOCK_N = gl.constexpr(128)
"""Outputs of a tile, half of them for each warpgroup."""
BLOCK_M = gl.constexpr(128)
"""Rows of a tile, of two bytes each."""
STEP = gl.constexpr(128)
"""Channels of a step."""
STAGES = gl.constexpr(4)
"""Steps in the ring."""
TILES = gl.NVMMASharedLayout(128, 8, rank=2)
"""How tiles lie in shared memory."""
FEW_ROWS = 512
"""With more, no product is cut along K: there are tiles enough."""


def half_layout() -> object:
    """Return the layout of a warpgroup's sums [64, BLOCK_M]: of neighbouring columns of a product one is left."""
    columns = [[0, 4 << bit] for bit in range((BLOCK_M.value // 4).bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0], *columns], lanes, [[16, 0], [32, 0]], [], [64, BLOCK_M.value])


@gluon.jit
def _place(work, row_tiles, steps, steps_per_split, SPLITS: gl.constexpr):
    """Return a piece of work: its tile, its part of K, first output and row, first step and number of steps.

    Tiles of the same weights are neighbours, so that these are read from memory once.
    """
    tile, split = work // SPLITS, work % SPLITS
    begin = split * steps_per_split
    count = gl.maximum(gl.minimum(begin + steps_per_split, steps) - begin, 0)
    return tile, split, tile // row_tiles * BLOCK_N, tile % row_tiles * BLOCK_M, begin, count


@gluon.jit
def _produce(
    w_tiles, x_tiles, ws, xs, full, empty, works, row_tiles, steps, steps_per_split,
    SPLITS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (2 * BLOCK_M + BLOCK_N) * STEP
    _, _, first_n, first_m, begin, count = _place(gl.program_id(0), row_tiles, steps, steps_per_split, SPLITS)
    for stage in gl.static_range(STAGES):  # weights are no other kernel's results
        if stage < count:
            mbarrier.expect(full.index(stage), BYTES)
            tma.async_copy_global_to_shared(
                w_tiles, [first_n, (begin + stage) * STEP], full.index(stage), ws.index(stage)
            )
    if OVERLAP:
        wait_for_earlier()
    first_count = count
    ring = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        _, _, first_n, first_m, begin, count = _place(work, row_tiles, steps, steps_per_split, SPLITS)
        for i in range(count):
            slot = ring % STAGES
            if ring >= STAGES:
                mbarrier.wait(empty.index(slot), (ring // STAGES - 1) & 1)
            if ring >= gl.minimum(STAGES, first_count):
                mbarrier.expect(full.index(slot), BYTES)
                tma.async_copy_global_to_shared(
                    w_tiles, [first_n, (begin + i) * STEP], full.index(slot), ws.index(slot)
                )
            tma.async_copy_global_to_shared(
                x_tiles, [2 * first_m, (begin + i) * STEP], full.index(slot), xs.index(slot)
            )
            ring += 1


@gluon.jit
def _consume(
    PART: gl.constexpr,
    ws, xs, full, empty, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, works, row_tiles, steps, steps_per_split, y_stride,
    SPLITS: gl.constexpr, HALF: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    slot_n = gl.arange(0, 64, layout=gl.SliceLayout(1, HALF))
    slot_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, HALF))
    if OVERLAP:
        wait_for_earlier()
    ring = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        tile, split, tile_n, first_m, _, count = _place(work, row_tiles, steps, steps_per_split, SPLITS)
        first_n = tile_n + PART * 64
        acc = gl.zeros([64, 2 * BLOCK_M], gl.int32, SUMS)
        for i in range(count):
            slot = ring % STAGES
            mbarrier.wait(full.index(slot), ring // STAGES & 1)
            w = ws.index(slot).slice(PART * 64, 64, dim=0)
            acc = warpgroup_mma(w, xs.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            gl.thread_barrier()
            if i > 0:  # the step before is done
                mbarrier.arrive(empty.index((ring + STAGES - 1) % STAGES), count=1)
            ring += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.thread_barrier()
        if count > 0:
            mbarrier.arrive(empty.index((ring + STAGES - 1) % STAGES), count=1)
        upper, lower = gl.split(gl.reshape(acc, [64, BLOCK_M, 2]))
        sums = upper.to(gl.float32) * 256.0 + lower.to(gl.float32)
        sums = gl.convert_layout(sums, HALF, assert_trivial=True)
        is_done = 1
        if SPLITS > 1:
            places = block_places(HALF, 64, BLOCK_M, 4)
            sums, is_done = add_splits(
                sums, partial_ptr, counter_ptr, tile * 2 + PART, split, places, SPLITS, 64 * BLOCK_M
            )
        if is_done:
            sums *= gl.expand_dims(gl.load(scale_ptr + gl.minimum(first_n + slot_n, N - 1)), 1)
            sums *= gl.expand_dims(gl.load(x_scale_ptr + gl.minimum(first_m + slot_m, M - 1)), 0)
            store_tile(sums, bias_ptr, y_ptr, first_n, first_m, M, N, y_stride, HALF, 4, False)


@gluon.jit(do_not_specialize=["M", "works", "steps", "steps_per_split", "row_tiles"])
def _integer_gemm_kernel(
    x_tiles, w_tiles, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, works, row_tiles, steps, steps_per_split, y_stride,
    SPLITS: gl.constexpr, HALF: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    ws = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, STEP], w_tiles.layout)
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, 2 * BLOCK_M, STEP], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    if OVERLAP:
        let_next_start()
    gl.warp_specialize(
        [
            (_consume, (
                0, ws, xs, full, empty, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
                M, N, works, row_tiles, steps, steps_per_split, y_stride, SPLITS, HALF, OVERLAP,
            )),
            (_consume, (
                1, ws, xs, full, empty, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
                M, N, works, row_tiles, steps, steps_per_split, y_stride, SPLITS, HALF, OVERLAP,
            )),
            (_produce, (
                w_tiles, x_tiles, ws, xs, full, empty, works, row_tiles, steps, steps_per_split,
                SPLITS, OVERLAP,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def choose_splits(rows: int, n: int, k: int) -> int:
    """Return into how many parts K is cut, by the steps that the busiest multiprocessor has.

    A tile's end costs as much as four steps, and four more where parts are added up (docs/kernels.md).
    """
    tiles, steps = ceil_div(n, BLOCK_N.value) * ceil_div(rows, BLOCK_M.value), ceil_div(k, STEP.value)

    def cost(splits: int) -> int:
        return ceil_div(tiles * splits, HOPPER_SMS) * (ceil_div(steps, splits) + 4 + 4 * (splits > 1))

    return min((1, 2, 4), key=cost) if rows <= FEW_ROWS else 1


def integer_gemm(
    rows: IntegerRows,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    splits: int = 0,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply rows by the transpose of an int8 weight with a scale per output; the result is bfloat16."""
    count, places, n = len(rows.scale_T), rows.octets.shape[1], len(weight.words)
    out_MN = torch.empty(count, n, dtype=torch.bfloat16, device=rows.octets.device)
    row_tiles, steps = ceil_div(count, BLOCK_M.value), places // STEP.value
    tiles = ceil_div(n, BLOCK_N.value) * row_tiles
    workspace = workspace or default_workspace(out_MN.device)
    splits = workspace.most_splits(splits or choose_splits(count, n, places), 2 * tiles, 64 * BLOCK_M.value)
    _integer_gemm_kernel[(min(tiles * splits, HOPPER_SMS),)](
        TensorDescriptor.from_tensor(rows.octets, [2 * BLOCK_M.value, STEP.value], TILES),
        TensorDescriptor.from_tensor(weight.words.view(torch.int8), [BLOCK_N.value, STEP.value], TILES),
        rows.scale_T, weight.scales, bias_N, out_MN, workspace.partials, workspace.counters,
        count, n, tiles * splits, row_tiles, steps, ceil_div(steps, splits), out_MN.stride(0),
        splits, half_layout(), overlaps_launches(out_MN.device), **launch_options(out_MN.device, 4, 1),
    )  # fmt: skip
    return out_MN
