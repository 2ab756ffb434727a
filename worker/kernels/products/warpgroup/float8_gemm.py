# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of many float8 rows with 4-bit words on Hopper (W4A8): codes are float8 as they lie in their words.

Activations are rounded, weights are not (`codes`). A weight is ``code * scale + bias``. The scale of a group multiplies
the group's sums, in float32. The bias multiplies the sums of the group's activations, as one more product, in bfloat16:
``sum over groups of bias[n, g] * sum[m, g]``.

The rings of words and of activations are filled ahead. Activations come through a tensor map: what threads copy
themselves, the tensor core may read only after a fence, which waits for all loads that are on their way. Sums are read
when no product is on its way: else the compiler lets each product wait for the one before. While one warpgroup adds
up, the other one's products run. All products of a step are done at its end, so a slot is free after the next barrier.
"""

# M rows of activations, N output channels, K input channels, S spans

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
    halves,
    scale_layout,
)
from mgpu.worker.kernels.products.warpgroup.gemm import _add_splits
from mgpu.worker.kernels.products.warpgroup.widen import GROUPS, PAIRS
from mgpu.worker.kernels.runtime import Workspace, ceil_div, launch_options, overlaps_launches, workspace_for
from mgpu.worker.quantization.packing import PackedWeight

BLOCK_M = 128
MOST_CHUNKS = 4
"""Chunks of 64 spans whose sums fit into shared memory."""


@dataclass(frozen=True, slots=True)
class Float8Tiling:
    """How a product is cut: outputs of a tile (16 a warp), parts of K, warps, steps in the rings."""

    block_n: int = 128
    splits: int = 1
    num_warps: int = 8
    stages: int = 4


@gluon.jit
def _load_scales(scale_ptr, rows, span, groups, KIND: gl.constexpr, PER_GROUP: gl.constexpr, EVEN: gl.constexpr):
    """Return what multiplies the sums of some spans, [rows, spans]."""
    group = span // PER_GROUP
    if not EVEN:
        group = gl.minimum(group, groups - 1)
    scale = gl.load(scale_ptr + gl.expand_dims(rows, 1) * groups + gl.expand_dims(group, 0))
    if KIND == PAIRS:
        scale = (scale << 16).to(gl.float32, bitcast=True)
    return scale.to(gl.float32) * CODE_FACTOR


@gluon.jit
def _load_biases(scale_ptr, zero_ptr, rows, span, end_span, groups, KIND: gl.constexpr, PER_GROUP: gl.constexpr):
    """Return what multiplies the sums of activations of 64 spans, bfloat16 [rows, 64]; zero from ``end_span`` on."""
    group = gl.minimum(span // PER_GROUP, groups - 1)
    places = gl.expand_dims(rows, 1) * groups + gl.expand_dims(group, 0)
    if KIND == PAIRS:
        pair = gl.load(scale_ptr + places)
        bias = (pair & -65536).to(gl.float32, bitcast=True) - 8.0 * (pair << 16).to(gl.float32, bitcast=True)
    else:
        scale = gl.load(scale_ptr + places).to(gl.float32)
        bias = -8.0 * scale
        if zero_ptr is not None:
            bias -= gl.load(zero_ptr + places).to(gl.float32) * scale
    return gl.where(gl.expand_dims(span < end_span, 0), bias, 0.0).to(gl.bfloat16)


@gluon.jit
def _add(acc, sums, scale, SUMS: gl.constexpr):
    scale = gl.convert_layout(scale, gl.SliceLayout(1, SUMS), assert_trivial=True)
    return acc + sums * gl.expand_dims(scale, 1)


@gluon.jit
def _add_two(
    acc, even, odd, never, codes_0, codes_1, x, scale_0, scale_1,
    FIRST: gl.constexpr, SPAN: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Add the products of two spans. ``never`` is false: the registers of ``even`` and ``odd`` are used again."""
    even = warpgroup_mma(codes_0, x.slice(FIRST * SPAN, SPAN, dim=0), even, use_acc=never, is_async=True)
    odd = warpgroup_mma(codes_1, x.slice((FIRST + 1) * SPAN, SPAN, dim=0), odd, use_acc=never, is_async=True)
    even, odd = warpgroup_mma_wait(0, deps=[even, odd])
    acc = _add(_add(acc, even, scale_0, SUMS), odd, scale_1, SUMS)
    return warpgroup_mma_wait(0, deps=[acc]), even, odd  # so that they are added before they are used again


@gluon.jit
def _add_step(
    acc, even, odd, never, codes, x, scales,
    SPAN: gl.constexpr, ROWS: gl.constexpr, OPERAND: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Add the products of a step."""
    if SPAN == 128:
        even = warpgroup_mma(codes, x, even, use_acc=never, is_async=True)
        even = warpgroup_mma_wait(0, deps=[even])
        acc = _add(acc, even, gl.reshape(scales, [ROWS]), SUMS)
        acc = warpgroup_mma_wait(0, deps=[acc])
    elif SPAN == 64:
        codes_0, codes_1 = halves(codes, ROWS, 128, OPERAND)
        scale_0, scale_1 = gl.split(scales)
        acc, even, odd = _add_two(acc, even, odd, never, codes_0, codes_1, x, scale_0, scale_1, 0, SPAN, SUMS)
    else:
        left, right = halves(codes, ROWS, 128, OPERAND)
        codes_0, codes_1 = halves(left, ROWS, 64, OPERAND)
        codes_2, codes_3 = halves(right, ROWS, 64, OPERAND)
        for_even, for_odd = gl.split(gl.reshape(scales, [ROWS, 2, 2]))
        scale_0, scale_2 = gl.split(for_even)
        scale_1, scale_3 = gl.split(for_odd)
        acc, even, odd = _add_two(acc, even, odd, never, codes_0, codes_1, x, scale_0, scale_1, 0, SPAN, SUMS)
        acc, even, odd = _add_two(acc, even, odd, never, codes_2, codes_3, x, scale_2, scale_3, 2, SPAN, SUMS)
    return acc, even, odd


@gluon.jit(do_not_specialize=["M", "steps", "eights_per_split", "row_tiles", "chunks"])
def _float8_words_kernel(
    x_tiles, x_scale_ptr, x_sum_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, groups, steps, eights_per_split, row_tiles, chunks, y_stride,
    KIND: gl.constexpr, SPAN: gl.constexpr, PER_GROUP: gl.constexpr, SPLITS: gl.constexpr, CHUNKS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    EVEN: gl.constexpr, BYTES: gl.constexpr, SCALES: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """PER_GROUP: spans that share a scale."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    WIDE_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    WIDE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, WIDE_SUMS, 2)
    WORD_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [num_warps, 1], [1, 0])
    SUM_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    AHEAD: gl.constexpr = STAGES - 1
    SPANS: gl.constexpr = 128 // SPAN
    tile, split = gl.program_id(0), gl.program_id(1)
    first_n = tile // row_tiles * BLOCK_N
    first_m = tile % row_tiles * BLOCK_M
    begin = split * eights_per_split * 8
    end = gl.minimum(begin + eights_per_split * 8, steps)
    ws = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N, 64], gl.SwizzledSharedLayout(16, 2, 4, [1, 0]))
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, 128], x_tiles.layout)
    sums_of_x = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, BLOCK_M, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    arrivals = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrivals.index(stage), count=1)
    fence_async_shared()
    gl.thread_barrier()
    copied_n = gl.minimum(first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, WORD_COPY)), N - 1)
    byte = gl.arange(0, 64, layout=gl.SliceLayout(0, WORD_COPY))
    w_ptrs = w_ptr + gl.expand_dims(copied_n.to(gl.int64) * (steps * 64), 1) + gl.expand_dims(byte, 0)
    for stage in gl.static_range(AHEAD):  # weights are no other kernel's results
        if begin + stage < end:
            async_copy.async_copy_global_to_shared(ws.index(stage), w_ptrs + (begin + stage) * 64)
        async_copy.commit_group()
    if OVERLAP:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1
        )
    summed_m = gl.minimum(first_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, SUM_COPY)), M - 1)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, SUM_COPY))
    stride = (steps * SPANS + 63) // 64 * 64
    sum_ptrs = x_sum_ptr + gl.expand_dims(summed_m * stride, 1) + gl.expand_dims(begin * SPANS + column, 0)
    for chunk in range(chunks):
        left = gl.expand_dims(begin * SPANS + chunk * 64 + column // 8 * 8 < steps * SPANS, 0)
        async_copy.async_copy_global_to_shared(sums_of_x.index(chunk), sum_ptrs + chunk * 64, mask=left)
    async_copy.commit_group()
    for stage in gl.static_range(AHEAD):
        if begin + stage < end:
            mbarrier.expect(arrivals.index(stage), BLOCK_M * 128)
            at = [first_m, (begin + stage) * 128]
            tma.async_copy_global_to_shared(x_tiles, at, arrivals.index(stage), xs.index(stage))

    n = gl.minimum(first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SCALES)), N - 1)
    span = gl.arange(0, SPANS, layout=gl.SliceLayout(0, SCALES))
    scales = _load_scales(scale_ptr, n, gl.minimum(begin, steps - 1) * SPANS + span, groups, KIND, PER_GROUP, EVEN)
    wide_n = gl.minimum(first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, WIDE_OPERAND)), N - 1)
    wide_span = begin * SPANS + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE_OPERAND))
    wide = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, WIDE_SUMS)
    async_copy.wait_group(0)
    fence_async_shared()  # what copies have written is read by the tensor core
    gl.thread_barrier()
    for chunk in range(chunks):
        biases = _load_biases(scale_ptr, zero_ptr, wide_n, wide_span + chunk * 64, end * SPANS, groups, KIND, PER_GROUP)
        wide = warpgroup_mma(biases, sums_of_x.index(chunk).permute((1, 0)), wide, is_async=True)
        wide, _ = warpgroup_mma_wait(0, deps=[wide, biases])
    acc = gl.convert_layout(wide, SUMS, assert_trivial=True)
    never = M < 0  # not known while compiling, so that sums stay in their registers
    even = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    odd = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SUMS)
    for step in range(begin, end):
        i = step - begin
        async_copy.wait_group(AHEAD - 1)
        gl.thread_barrier()
        if step + AHEAD < end:
            slot = (i + AHEAD) % STAGES
            async_copy.async_copy_global_to_shared(ws.index(slot), w_ptrs + (step + AHEAD) * 64)
            mbarrier.expect(arrivals.index(slot), BLOCK_M * 128)
            at = [first_m, (step + AHEAD) * 128]
            tma.async_copy_global_to_shared(x_tiles, at, arrivals.index(slot), xs.index(slot))
        async_copy.commit_group()
        next_step = gl.minimum(step + 1, steps - 1)
        next_scales = _load_scales(scale_ptr, n, next_step * SPANS + span, groups, KIND, PER_GROUP, EVEN)
        codes = codes_of(ws.index(i % STAGES).load(BYTES), BLOCK_N, OPERAND)
        mbarrier.wait(arrivals.index(i % STAGES), i // STAGES % 2)
        x = xs.index(i % STAGES).permute((1, 0))
        acc, even, odd = _add_step(acc, even, odd, never, codes, x, scales, SPAN, BLOCK_N, OPERAND, SUMS)
        scales = next_scales

    n_out = first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SUMS))
    m = first_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SUMS))
    is_done = 1
    if SPLITS > 1:
        row, line = n_out - first_n, m - first_m  # blocks of 8 x 8 sums, as warps have them
        offsets = gl.expand_dims(row // 8 * (8 * BLOCK_M) + row % 8 * 8, 1)
        offsets = offsets + gl.expand_dims(line // 8 * 64 + line % 8, 0)
        acc, is_done = _add_splits(acc, partial_ptr, counter_ptr, tile, split, offsets, SPLITS, BLOCK_N * BLOCK_M)
    if is_done:
        acc *= gl.expand_dims(gl.load(x_scale_ptr + gl.minimum(m, M - 1)), 0)
        if bias_ptr is not None:
            acc += gl.expand_dims(gl.load(bias_ptr + gl.minimum(n_out, N - 1)).to(gl.float32), 1)
        mask = gl.expand_dims(m < M, 0) & gl.expand_dims(n_out < N, 1)
        y_ptrs = y_ptr + gl.expand_dims(m * y_stride, 0) + gl.expand_dims(n_out, 1)
        gl.store(y_ptrs, acc.to(gl.bfloat16), mask=mask)


def choose_tiling(rows: int, n: int, k: int, span: int) -> Float8Tiling:
    """Pick tiles."""
    steps, row_tiles = ceil_div(k, STEP), ceil_div(rows, BLOCK_M)
    tiles = ceil_div(n, 128) * row_tiles
    splits = 1 if tiles > 66 else min(4, 132 // tiles)
    least = ceil_div(steps * STEP // span, 64 * MOST_CHUNKS)
    return Float8Tiling(splits=max(splits, least))


def float8_words_gemm(
    rows: SpanRows,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    tiling: Float8Tiling | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply quantized rows by the dequantized weight's transpose; the result is bfloat16."""
    (count, places), (n, words_per_row), span = rows.values.shape, weight.words.shape, rows.span
    tiling = tiling or choose_tiling(count, n, places, span)
    steps = words_per_row // 16
    eights_per_split = ceil_div(ceil_div(steps, tiling.splits), 8)
    out_MN = torch.empty(count, n, dtype=torch.bfloat16, device=rows.values.device)
    row_tiles = ceil_div(count, BLOCK_M)
    tiles = ceil_div(n, tiling.block_n) * row_tiles
    if workspace is None:
        held = tiles if tiling.splits > 1 else 0
        workspace = workspace_for(out_MN.device, held * tiling.splits * tiling.block_n * BLOCK_M, held)
    group = weight.group or weight.k
    x_tiles = TensorDescriptor.from_tensor(rows.values, [BLOCK_M, STEP], X_TILES)
    _float8_words_kernel[(tiles, tiling.splits)](
        x_tiles, rows.scale_T, rows.sums_TS, weight.words.view(torch.uint8), weight.scales, weight.zeros, bias_N,
        out_MN, workspace.partials, workspace.counters,
        count, n, weight.scales.shape[1], steps, eights_per_split, row_tiles,
        ceil_div(eights_per_split * 8 * STEP // span, 64), out_MN.stride(0),
        (PAIRS if weight.has_pairs else GROUPS).value, span, max(1, ceil_div(group, span)), tiling.splits,
        MOST_CHUNKS, BLOCK_M, tiling.block_n, tiling.stages, group * weight.scales.shape[1] == places,
        byte_layout(tiling.block_n, tiling.num_warps), scale_layout(tiling.block_n, tiling.num_warps, STEP // span),
        overlaps_launches(out_MN.device), **launch_options(out_MN.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_MN
