# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of float8 rows with float8 weights in blocks of 128 x 128, on Hopper, for up to a few hundred rows.

Both operands come through tensor maps into one ring. A step is a block: its products are multiplied by the block's
scale and by those of the rows, in float32.
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
    power_of_2,
)
from mgpu.worker.quantization.float8_rows import Float8Blocks
from mgpu.worker.quantization.packing import PackedWeight

STEP = 128
"""Channels of a step, a block's."""
TILES = gl.NVMMASharedLayout(128, 8, rank=2)
"""How tiles lie in shared memory."""


@dataclass(frozen=True, slots=True)
class BlockTiling:
    """How a product is cut; a tile has 128 outputs."""

    block_m: int = 64
    splits: int = 1
    num_warps: int = 4
    stages: int = 4


@gluon.jit(do_not_specialize=["M", "padded_m", "steps", "steps_per_split", "row_tiles"])
def _block_gemm_kernel(
    x_tiles, w_tiles, x_scale_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, padded_m, steps, steps_per_split, row_tiles, y_stride,
    SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = 128
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 32])
    AHEAD: gl.constexpr = STAGES - 1
    BYTES: gl.constexpr = (BLOCK_N + BLOCK_M) * 128
    tile, split = gl.program_id(0), gl.program_id(1)
    first_n = tile // row_tiles * BLOCK_N
    first_m = tile % row_tiles * BLOCK_M
    begin = split * steps_per_split
    end = gl.minimum(begin + steps_per_split, steps)
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_N, 128], w_tiles.layout)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, 128], x_tiles.layout)
    arrivals = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrivals.index(stage), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for stage in gl.static_range(AHEAD):  # weights are no other kernel's results
        if begin + stage < end:
            mbarrier.expect(arrivals.index(stage), BYTES)
            tma.async_copy_global_to_shared(
                w_tiles, [first_n, (begin + stage) * 128], arrivals.index(stage), ws.index(stage)
            )
    if OVERLAP:
        let_next_start()
        wait_for_earlier()
    for stage in gl.static_range(AHEAD):
        if begin + stage < end:
            tma.async_copy_global_to_shared(
                x_tiles, [first_m, (begin + stage) * 128], arrivals.index(stage), xs.index(stage)
            )
    x_scale_ptrs = x_scale_ptr + gl.minimum(first_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SUMS)), M - 1)
    scale_ptr += first_n // 128 * steps
    first = gl.minimum(begin, steps - 1)
    scales = gl.load(x_scale_ptrs + first * padded_m) * gl.load(scale_ptr + first)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    products = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    never = M < 0  # not known while compiling, so that products stay in their registers
    for step in range(begin, end):
        i = step - begin
        mbarrier.wait(arrivals.index(i % STAGES), i // STAGES % 2)
        x = xs.index(i % STAGES).permute((1, 0))
        products = warpgroup_mma(ws.index(i % STAGES), x, products, use_acc=never, is_async=True)
        next_step = gl.minimum(step + 1, steps - 1)
        next_scales = gl.load(x_scale_ptrs + next_step * padded_m) * gl.load(scale_ptr + next_step)
        products = warpgroup_mma_wait(0, deps=[products])
        gl.thread_barrier()  # all warps are done with the step
        if step + AHEAD < end:
            slot = (i + AHEAD) % STAGES
            mbarrier.expect(arrivals.index(slot), BYTES)
            tma.async_copy_global_to_shared(
                w_tiles, [first_n, (step + AHEAD) * 128], arrivals.index(slot), ws.index(slot)
            )
            tma.async_copy_global_to_shared(
                x_tiles, [first_m, (step + AHEAD) * 128], arrivals.index(slot), xs.index(slot)
            )
        acc += products * gl.expand_dims(scales, 0)
        scales = next_scales

    is_done = 1
    if SPLITS > 1:
        places = block_places(SUMS, BLOCK_N, BLOCK_M, 8)
        acc, is_done = add_splits(acc, partial_ptr, counter_ptr, tile, split, places, SPLITS, BLOCK_N * BLOCK_M)
    if is_done:
        store_tile(acc, bias_ptr, y_ptr, first_n, first_m, M, N, y_stride, SUMS, num_warps, True)


def choose_tiling(rows: int, n: int, k: int) -> BlockTiling:
    """Pick tiles, by the steps that the busiest multiprocessor has, with two programs at a time."""
    block_m = min(64, max(16, power_of_2(rows)))
    tiles, steps = ceil_div(n, 128) * ceil_div(rows, block_m), ceil_div(k, STEP)

    def cost(splits: int) -> int:
        return ceil_div(tiles * splits, 2 * HOPPER_SMS) * (ceil_div(steps, splits) + 4 + 2 * (splits > 1))

    return BlockTiling(block_m=block_m, splits=min((1, 2, 4, 8), key=cost))


def block_gemm(
    rows: Float8Blocks,
    count: int,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    tiling: BlockTiling | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply the first ``count`` rows by the transpose of a weight of blocks; the result is bfloat16."""
    places, n = rows.values.shape[1], len(weight.words)
    tiling = tiling or choose_tiling(count, n, places)
    out_MN = torch.empty(count, n, dtype=torch.bfloat16, device=rows.values.device)
    row_tiles, steps = ceil_div(count, tiling.block_m), places // STEP
    tiles = ceil_div(n, 128) * row_tiles
    workspace = workspace or default_workspace(out_MN.device)
    splits = workspace.most_splits(tiling.splits, tiles, 128 * tiling.block_m)
    _block_gemm_kernel[(tiles, splits)](
        TensorDescriptor.from_tensor(rows.values, [tiling.block_m, STEP], TILES),
        TensorDescriptor.from_tensor(weight.words.view(torch.float8_e4m3fn), [128, STEP], TILES),
        rows.scale_TB, weight.scales, bias_N, out_MN, workspace.partials, workspace.counters,
        count, n, rows.scale_TB.stride(1), steps, ceil_div(steps, splits), row_tiles, out_MN.stride(0),
        splits, tiling.block_m, tiling.stages,
        overlaps_launches(out_MN.device), **launch_options(out_MN.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_MN
