# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of many float8 rows with 4-bit words in groups of 64 and more on Hopper (W4A8): no code is converted.

Activations are rounded, weights are not (`codes`). A weight is ``code * scale + bias``. The scale of a group multiplies
the group's sums, in float32. The bias multiplies the sums of the group's activations, as one more product, in bfloat16:
``sum over groups of bias[n, g] * sum[m, g]``.

A program has two warpgroups that multiply, 64 outputs each, and a warp that fills the ring of words and activations
through tensor maps. No barrier joins the three: a slot is full when its bytes have come, and empty when both warpgroups
have used it. So while one adds up, the products of the other run, and words of the next tile come while the last sums
of this one are stored. The sums of activations come through the ring as well, behind the last step of a tile.
"""

# M rows of activations, N output channels, K input channels, S spans

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

from mgpu.worker.kernels.layers.float8_codes import SpanRows
from mgpu.worker.kernels.products.warpgroup.codes import (
    CODE_FACTOR,
    STEP,
    X_TILES,
    byte_layout,
    codes_of,
    scale_layout,
)
from mgpu.worker.kernels.products.warpgroup.float8_steps import add_step, load_biases, load_scales
from mgpu.worker.kernels.products.warpgroup.parts import add_parts, fewest_steps, place, share
from mgpu.worker.kernels.products.warpgroup.tile_end import let_next_start, store_tile, wait_for_earlier
from mgpu.worker.kernels.runtime import (
    Workspace,
    ceil_div,
    launch_options,
    overlaps_launches,
    workspace_for,
)
from mgpu.worker.quantization.packing import PackedWeight

BLOCK_M, BLOCK_N = 128, 128
WORD_TILES = gl.NVMMASharedLayout(64, 8, rank=2)
SUM_TILES = gl.NVMMASharedLayout(128, 16, rank=2)
STAGES = 6
"""Steps in the ring."""
END = 3.0
"""Steps that take as long as the end of a tile."""
REGISTERS = gl.constexpr((232, 40))
"""Of a thread that multiplies, and of one that copies."""


@gluon.jit
def _chunks(begin, count, SPANS: gl.constexpr):
    """Return the first of the spans whose sums are copied, of steps, and how many times 64: copies begin at eights."""
    first = begin * SPANS // 8 * 8
    return first, ((begin + count) * SPANS - first + 63) // 64


@gluon.jit
def _copy(
    maps, ring_buffers, barriers, scale_ptr, N, groups, tiles, columns, steps,
    SPANS: gl.constexpr, PER_GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Fill the ring."""
    w_tiles, x_tiles, sum_tiles = maps
    ws, xs = ring_buffers
    full, empty = barriers
    BYTES: gl.constexpr = BLOCK_M * 128 + BLOCK_N * 64
    SECTOR: gl.constexpr = 2 * PER_GROUP  # steps whose scales lie in 32 bytes, or so
    first, end = share(gl.program_id(0), tiles, steps), share(gl.program_id(0) + 1, tiles, steps)
    first_n, _, begin, count = place(first // steps, first, end, columns, steps, BLOCK_M, BLOCK_N)
    for stage in gl.static_range(STAGES):  # weights are no other kernel's results
        if stage < count:
            mbarrier.expect(full.index(stage), BYTES)
            at = [first_n, (begin + stage) * 64]
            tma.async_copy_global_to_shared(w_tiles, at, full.index(stage), ws.index(stage))
    if OVERLAP:
        wait_for_earlier()
    ring, begun = 0, gl.minimum(count, STAGES)
    for tile in range(first // steps, (end + steps - 1) // steps):
        first_n, first_m, begin, count = place(tile, first, end, columns, steps, BLOCK_M, BLOCK_N)
        n = gl.minimum(first_n + gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [1], [0])), N - 1)
        for step in range(begin, begin + count):
            slot = ring % STAGES
            if step == begin or step % SECTOR == 0:
                group = gl.minimum(step * SPANS // PER_GROUP, groups - 1)
                gl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; // $0",
                    "=r,l",
                    [scale_ptr + n * groups + group],
                    gl.int32,
                    is_pure=False,
                    pack=1,
                )
            if ring >= STAGES:
                mbarrier.wait(empty.index(slot), (ring // STAGES - 1) & 1)
            if ring >= begun:
                mbarrier.expect(full.index(slot), BYTES)
                tma.async_copy_global_to_shared(w_tiles, [first_n, step * 64], full.index(slot), ws.index(slot))
            tma.async_copy_global_to_shared(x_tiles, [first_m, step * 128], full.index(slot), xs.index(slot))
            ring += 1
        first_span, chunks = _chunks(begin, count, SPANS)
        for chunk in range(chunks):
            slot = ring % STAGES
            if ring >= STAGES:
                mbarrier.wait(empty.index(slot), (ring // STAGES - 1) & 1)
            mbarrier.expect(full.index(slot), BLOCK_M * 128)
            sums = xs.index(slot)._reinterpret(gl.bfloat16, [BLOCK_M, 64], sum_tiles.layout)
            at = [first_m, first_span + chunk * 64]
            tma.async_copy_global_to_shared(sum_tiles, at, full.index(slot), sums)
            ring += 1


@gluon.jit
def _multiply(
    HALF: gl.constexpr, ring_buffers, barriers, factors, outputs,
    M, N, groups, tiles, columns, steps, y_stride,
    SPAN: gl.constexpr, PER_GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
    BYTES: gl.constexpr, SCALES: gl.constexpr, SUM_TILES: gl.constexpr,
):  # fmt: skip
    """Multiply half of a tile's outputs."""
    ROWS: gl.constexpr = BLOCK_N // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    WIDE_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    WIDE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, WIDE_SUMS, 2)
    SPANS: gl.constexpr = 128 // SPAN
    ws, xs = ring_buffers
    full, empty = barriers
    x_scale_ptr, scale_ptr, zero_ptr, bias_ptr = factors
    y_ptr, partial_ptr, counter_ptr = outputs
    never = M < 0  # not known while compiling, so that sums stay in their registers
    span = gl.arange(0, SPANS, layout=gl.SliceLayout(0, SCALES))
    ring = 0
    first, end = share(gl.program_id(0), tiles, steps), share(gl.program_id(0) + 1, tiles, steps)
    for tile in range(first // steps, (end + steps - 1) // steps):
        first_n, first_m, begin, count = place(tile, first, end, columns, steps, BLOCK_M, BLOCK_N)
        first_n += HALF * ROWS
        n = gl.minimum(first_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCALES)), N - 1)
        scales = load_scales(scale_ptr, n, gl.minimum(begin, steps - 1) * SPANS + span, groups, PER_GROUP, EVEN)
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, SUMS)
        even = gl.zeros([ROWS, BLOCK_M], gl.float32, SUMS)
        odd = gl.zeros([ROWS, BLOCK_M], gl.float32, SUMS)
        for step in range(begin, begin + count):
            slot = ring % STAGES
            next_step = gl.minimum(step + 1, steps - 1)
            next_scales = load_scales(scale_ptr, n, next_step * SPANS + span, groups, PER_GROUP, EVEN)
            mbarrier.wait(full.index(slot), ring // STAGES & 1)
            codes = codes_of(ws.index(slot).slice(HALF * ROWS, ROWS, dim=0).load(BYTES), ROWS, OPERAND)
            x = xs.index(slot).permute((1, 0))
            acc, even, odd = add_step(
                acc, even, odd, never, codes, x, scales.to(gl.float32) * CODE_FACTOR, SPAN, ROWS, OPERAND, SUMS
            )
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            scales = next_scales
            ring += 1
        wide = gl.convert_layout(acc, WIDE_SUMS, assert_trivial=True)
        wide_n = gl.minimum(first_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE_OPERAND)), N - 1)
        first_span, chunks = _chunks(begin, count, SPANS)
        wide_span = first_span + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE_OPERAND))
        for chunk in range(chunks):
            slot = ring % STAGES
            biases = load_biases(
                scale_ptr, zero_ptr, wide_n, wide_span + chunk * 64, begin * SPANS, (begin + count) * SPANS, groups,
                PER_GROUP,
            )  # fmt: skip
            mbarrier.wait(full.index(slot), ring // STAGES & 1)
            sums = xs.index(slot)._reinterpret(gl.bfloat16, [BLOCK_M, 64], SUM_TILES)
            wide = warpgroup_mma(biases, sums.permute((1, 0)), wide, is_async=True)
            wide, _ = warpgroup_mma_wait(0, deps=[wide, biases])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            ring += 1
        acc = gl.convert_layout(wide, SUMS, assert_trivial=True)
        is_done = 1
        if count < steps:
            acc, is_done = add_parts(acc, partial_ptr, counter_ptr, tile, first // steps, tiles, steps, HALF, SUMS)
        if is_done:
            m = first_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SUMS))
            acc *= gl.expand_dims(gl.load(x_scale_ptr + gl.minimum(m, M - 1)), 0)
            store_tile(acc, bias_ptr, y_ptr, first_n, first_m, M, N, y_stride, SUMS, 4, False)


@gluon.jit(do_not_specialize=["M", "tiles", "columns", "steps"])
def _float8_words_kernel(
    w_tiles, x_tiles, sum_tiles, x_scale_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, groups, tiles, columns, steps, y_stride,
    SPAN: gl.constexpr, PER_GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
    BYTES: gl.constexpr, SCALES: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """PER_GROUP: spans that share a scale."""
    SUM_TILES: gl.constexpr = sum_tiles.layout
    ws = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N, 64], w_tiles.layout)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, 128], x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    if OVERLAP:
        let_next_start()
    ring_buffers, barriers, maps = (ws, xs), (full, empty), (w_tiles, x_tiles, sum_tiles)
    factors, outputs = (x_scale_ptr, scale_ptr, zero_ptr, bias_ptr), (y_ptr, partial_ptr, counter_ptr)
    gl.warp_specialize(
        [
            (_multiply, (
                0, ring_buffers, barriers, factors, outputs, M, N, groups, tiles, columns, steps, y_stride,
                SPAN, PER_GROUP, BLOCK_M, BLOCK_N, STAGES, EVEN, BYTES, SCALES, SUM_TILES,
            )),
            (_multiply, (
                1, ring_buffers, barriers, factors, outputs, M, N, groups, tiles, columns, steps, y_stride,
                SPAN, PER_GROUP, BLOCK_M, BLOCK_N, STAGES, EVEN, BYTES, SCALES, SUM_TILES,
            )),
            (_copy, (
                maps, ring_buffers, barriers, scale_ptr, N, groups, tiles, columns, steps,
                128 // SPAN, PER_GROUP, BLOCK_M, BLOCK_N, STAGES, OVERLAP,
            )),
        ],
        [4, 1],
        [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


def choose_programs(rows: int, n: int, k: int) -> int:
    """Return how many programs share a product."""
    return fewest_steps(ceil_div(n, BLOCK_N) * ceil_div(rows, BLOCK_M), ceil_div(k, STEP), END)


def float8_words_gemm(
    rows: SpanRows,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    programs: int | None = None,
    stages: int = STAGES,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply quantized rows by the dequantized weight's transpose; the result is bfloat16."""
    (count, places), (n, words_per_row), span = rows.values.shape, weight.words.shape, rows.span
    columns, steps = ceil_div(n, BLOCK_N), words_per_row // 16
    tiles = columns * ceil_div(count, BLOCK_M)
    programs = programs or choose_programs(count, n, places)
    out_MN = torch.empty(count, n, dtype=torch.bfloat16, device=rows.values.device)
    if workspace is None:
        workspace = workspace_for(out_MN.device, programs * 2 * BLOCK_N * BLOCK_M, tiles * 2)
    group = weight.group or weight.k
    _float8_words_kernel[(programs,)](
        TensorDescriptor.from_tensor(weight.words.view(torch.uint8), [BLOCK_N, STEP // 2], WORD_TILES),
        TensorDescriptor.from_tensor(rows.values, [BLOCK_M, STEP], X_TILES),
        TensorDescriptor.from_tensor(rows.sums_TS[:, : places // span], [BLOCK_M, 64], SUM_TILES),
        rows.scale_T, weight.scales, weight.zeros, bias_N, out_MN, workspace.partials, workspace.counters,
        count, n, weight.scales.shape[1], tiles, columns, steps, out_MN.stride(0),
        span, max(1, ceil_div(group, span)),
        BLOCK_M, BLOCK_N, stages, group * weight.scales.shape[1] == places,
        byte_layout(BLOCK_N // 2, 4), scale_layout(BLOCK_N // 2, 4, STEP // span),
        overlaps_launches(out_MN.device), **launch_options(out_MN.device, 4, 1),
    )  # fmt: skip
    return out_MN
