# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of many rows with int8 weights whose groups have scales, on Hopper: weights are widened in registers.

Words and activations come through tensor maps, each into a ring, filled by a warp of its own. A part of a block of
words is 32 neighbouring channels, so activations stay in order. Two warpgroups have half of a tile's outputs each, and
no barrier joins them. While the tensor core multiplies a part, the next is widened, with its scale: a weight is rounded
to bfloat16, as dequantizing does, and its scale as well.
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

from mgpu.worker.kernels.products.warpgroup.codes import scale_layout
from mgpu.worker.kernels.products.warpgroup.float8_steps import load_scales
from mgpu.worker.kernels.products.warpgroup.parts import add_parts, fewest_steps, place, share
from mgpu.worker.kernels.products.warpgroup.tile_end import let_next_start, store_tile, wait_for_earlier
from mgpu.worker.kernels.products.warpgroup.widen import twice, word_layouts
from mgpu.worker.kernels.runtime import (
    Workspace,
    ceil_div,
    launch_options,
    overlaps_launches,
    power_of_2,
    workspace_for,
)
from mgpu.worker.quantization.packing import PackedWeight

STEP = 128
"""Channels of a step: a block of 32 words. Activations come in halves of it."""
BLOCK_N = 128
WORD_TILES = gl.NVMMASharedLayout(128, 32, rank=2)
ROW_TILES = gl.NVMMASharedLayout(128, 16, rank=2)
END = 3.0
"""Steps that take as long as the end of a tile."""
REGISTERS = gl.constexpr((232, 40))
"""Of a thread that multiplies, and of one that copies."""


@dataclass(frozen=True, slots=True)
class OctetTiling:
    """How a product is cut; a tile has 128 outputs."""

    block_m: int = 128
    word_stages: int = 4
    row_stages: int = 8
    """Halves of steps in the ring of activations."""


@gluon.constexpr_function
def assembly(part, has_zero):
    """Return the instructions that widen a part of two words ($1 and $2): (q - zero) * scale, $3 and $5 twice each."""
    selector = ("0x7440", "0x7551", "0x7662", "0x7773")[part]
    zero = "sub.rn.bf16x2 a, a, $5;" if has_zero else ""
    return (
        f"{{ .reg .b32 t, a, b, c; mov.b32 c, 0xBF80BF80; prmt.b32 t, $1, $2, {selector};"
        "lop3.b32 a, t, 0x007f007f, 0x43004300, 0xEA; lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;"
        f"fma.rn.bf16x2 a, b, c, a; {zero} mul.rn.bf16x2 $0, a, $3; }}"
    )


@gluon.jit
def _widen(words, scale, zero, PART: gl.constexpr, HAS_ZERO: gl.constexpr, OPERAND: gl.constexpr):
    """Return a part of each word as a bfloat16 operand [rows, 32]."""
    TEXT: gl.constexpr = assembly(PART, HAS_ZERO)
    widened = gl.inline_asm_elementwise(
        TEXT, "=r,r,r,r,r,r,r", [words, scale, zero], dtype=gl.bfloat16, is_pure=True, pack=2
    )
    return gl.convert_layout(widened, OPERAND, assert_trivial=True)


@gluon.jit
def _wide(numbers, ROWS: gl.constexpr, WORDS: gl.constexpr):
    """Return what each of a row's words has, of numbers of rows, twice each."""
    numbers = gl.convert_layout(twice(numbers.to(gl.float32)), gl.SliceLayout(1, WORDS), assert_trivial=True)
    spread, _ = gl.broadcast(gl.expand_dims(numbers, 1), gl.full([ROWS, 32], 0, gl.int32, layout=WORDS))
    return spread


@gluon.jit
def _parts(numbers, ROWS: gl.constexpr):
    """Return the four columns of numbers [rows, 4]."""
    for_even, for_odd = gl.split(gl.reshape(numbers, [ROWS, 2, 2]))
    first, third = gl.split(for_even)
    second, fourth = gl.split(for_odd)
    return first, second, third, fourth


@gluon.jit
def _copy(
    maps, ring_buffers, barriers, tiles, columns, steps,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WORD_STAGES: gl.constexpr, ROW_STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    """Fill both rings."""
    w_tiles, x_tiles = maps
    ws, xs = ring_buffers
    w_full, w_empty, x_full, x_empty = barriers
    first, end = share(gl.program_id(0), tiles, steps), share(gl.program_id(0) + 1, tiles, steps)
    first_n, _, begin, count = place(first // steps, first, end, columns, steps, BLOCK_M, BLOCK_N)
    for stage in gl.static_range(WORD_STAGES):  # weights are no other kernel's results
        if stage < count:
            mbarrier.expect(w_full.index(stage), BLOCK_N * 128)
            at = [first_n, (begin + stage) * 32]
            tma.async_copy_global_to_shared(w_tiles, at, w_full.index(stage), ws.index(stage))
    if OVERLAP:
        wait_for_earlier()
    ring, begun = 0, gl.minimum(count, WORD_STAGES)
    for tile in range(first // steps, (end + steps - 1) // steps):
        first_n, first_m, begin, count = place(tile, first, end, columns, steps, BLOCK_M, BLOCK_N)
        for step in range(begin, begin + count):
            slot = ring % WORD_STAGES
            if ring >= begun:
                if ring >= WORD_STAGES:
                    mbarrier.wait(w_empty.index(slot), (ring // WORD_STAGES - 1) & 1)
                mbarrier.expect(w_full.index(slot), BLOCK_N * 128)
                tma.async_copy_global_to_shared(w_tiles, [first_n, step * 32], w_full.index(slot), ws.index(slot))
            for half in gl.static_range(2):
                turn = ring * 2 + half
                if turn >= ROW_STAGES:
                    mbarrier.wait(x_empty.index(turn % ROW_STAGES), (turn // ROW_STAGES - 1) & 1)
                mbarrier.expect(x_full.index(turn % ROW_STAGES), BLOCK_M * 128)
                at = [first_m, step * 128 + half * 64]
                tma.async_copy_global_to_shared(
                    x_tiles, at, x_full.index(turn % ROW_STAGES), xs.index(turn % ROW_STAGES)
                )
            ring += 1


@gluon.jit
def _multiply(
    HALF: gl.constexpr, ring_buffers, barriers, factors, outputs, M, N, groups, tiles, columns, steps, y_stride,
    PER_GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WORD_STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr, WORDS: gl.constexpr, SCALES: gl.constexpr,
):  # fmt: skip
    """Multiply half of a tile's outputs."""
    ROWS: gl.constexpr = BLOCK_N // 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ws, xs = ring_buffers
    w_full, w_empty, x_full, x_empty = barriers
    scale_ptr, zero_ptr, bias_ptr = factors
    y_ptr, partial_ptr, counter_ptr = outputs
    HAS_ZERO: gl.constexpr = zero_ptr is not None
    run = gl.arange(0, 4, layout=gl.SliceLayout(0, SCALES))
    ring = 0
    first, end = share(gl.program_id(0), tiles, steps), share(gl.program_id(0) + 1, tiles, steps)
    for tile in range(first // steps, (end + steps - 1) // steps):
        first_n, first_m, begin, count = place(tile, first, end, columns, steps, BLOCK_M, BLOCK_N)
        first_n += HALF * ROWS
        n = gl.minimum(first_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCALES)), N - 1)
        scale = load_scales(scale_ptr, n, gl.minimum(begin, steps - 1) * 4 + run, groups, PER_GROUP, False)
        zero = scale
        if HAS_ZERO:
            zero = load_scales(zero_ptr, n, gl.minimum(begin, steps - 1) * 4 + run, groups, PER_GROUP, False)
        acc = gl.zeros([ROWS, BLOCK_M], gl.float32, SUMS)
        for step in range(begin, begin + count):
            slot, turn = ring % WORD_STAGES, ring * 2
            ring += 1
            mbarrier.wait(w_full.index(slot), (ring - 1) // WORD_STAGES & 1)
            mbarrier.wait(x_full.index(turn % ROW_STAGES), turn // ROW_STAGES & 1)
            mbarrier.wait(x_full.index((turn + 1) % ROW_STAGES), (turn + 1) // ROW_STAGES & 1)
            words = ws.index(slot).slice(HALF * ROWS, ROWS, dim=0).load(WORDS)
            s0, s1, s2, s3 = _parts(scale, ROWS)
            z0, z1, z2, z3 = _parts(zero, ROWS)
            x = xs.index(turn % ROW_STAGES).permute((1, 0))
            widened = _widen(words, _wide(s0, ROWS, WORDS), _wide(z0, ROWS, WORDS), 0, HAS_ZERO, OPERAND)
            acc = warpgroup_mma(widened, x.slice(0, 32, dim=0), acc, is_async=True)
            widened = _widen(words, _wide(s1, ROWS, WORDS), _wide(z1, ROWS, WORDS), 1, HAS_ZERO, OPERAND)
            acc = warpgroup_mma(widened, x.slice(32, 32, dim=0), acc, is_async=True)
            x = xs.index((turn + 1) % ROW_STAGES).permute((1, 0))
            following = gl.minimum(step + 1, steps - 1) * 4 + run
            scale = load_scales(scale_ptr, n, following, groups, PER_GROUP, False)
            zero = scale
            if HAS_ZERO:
                zero = load_scales(zero_ptr, n, following, groups, PER_GROUP, False)
            widened = _widen(words, _wide(s2, ROWS, WORDS), _wide(z2, ROWS, WORDS), 2, HAS_ZERO, OPERAND)
            acc = warpgroup_mma(widened, x.slice(0, 32, dim=0), acc, is_async=True)
            widened = _widen(words, _wide(s3, ROWS, WORDS), _wide(z3, ROWS, WORDS), 3, HAS_ZERO, OPERAND)
            acc = warpgroup_mma(widened, x.slice(32, 32, dim=0), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            mbarrier.arrive(w_empty.index(slot), count=1)
            mbarrier.arrive(x_empty.index(turn % ROW_STAGES), count=1)
            mbarrier.arrive(x_empty.index((turn + 1) % ROW_STAGES), count=1)
        is_done = 1
        if count < steps:
            acc, is_done = add_parts(acc, partial_ptr, counter_ptr, tile, first // steps, tiles, steps, HALF, SUMS)
        if is_done:
            store_tile(acc, bias_ptr, y_ptr, first_n, first_m, M, N, y_stride, SUMS, 4, False)


@gluon.jit(do_not_specialize=["M", "groups", "tiles", "columns", "steps"])
def _octet_gemm_kernel(
    w_tiles, x_tiles, scale_ptr, zero_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, groups, tiles, columns, steps, y_stride,
    PER_GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WORD_STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr, WORDS: gl.constexpr, SCALES: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """PER_GROUP: runs of 32 channels that share a scale."""
    ws = gl.allocate_shared_memory(gl.int32, [WORD_STAGES, BLOCK_N, 32], w_tiles.layout)
    xs = gl.allocate_shared_memory(gl.bfloat16, [ROW_STAGES, BLOCK_M, 64], x_tiles.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [WORD_STAGES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [WORD_STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [ROW_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [ROW_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(WORD_STAGES):
        mbarrier.init(w_full.index(stage), count=1)
        mbarrier.init(w_empty.index(stage), count=2)
    for stage in gl.static_range(ROW_STAGES):
        mbarrier.init(x_full.index(stage), count=1)
        mbarrier.init(x_empty.index(stage), count=2)
    fence_async_shared()
    if OVERLAP:
        let_next_start()
    ring_buffers, barriers, maps = (ws, xs), (w_full, w_empty, x_full, x_empty), (w_tiles, x_tiles)
    factors, outputs = (scale_ptr, zero_ptr, bias_ptr), (y_ptr, partial_ptr, counter_ptr)
    gl.warp_specialize(
        [
            (_multiply, (
                0, ring_buffers, barriers, factors, outputs, M, N, groups, tiles, columns, steps, y_stride,
                PER_GROUP, BLOCK_M, BLOCK_N, WORD_STAGES, ROW_STAGES, WORDS, SCALES,
            )),
            (_multiply, (
                1, ring_buffers, barriers, factors, outputs, M, N, groups, tiles, columns, steps, y_stride,
                PER_GROUP, BLOCK_M, BLOCK_N, WORD_STAGES, ROW_STAGES, WORDS, SCALES,
            )),
            (_copy, (
                maps, ring_buffers, barriers, tiles, columns, steps,
                BLOCK_M, BLOCK_N, WORD_STAGES, ROW_STAGES, OVERLAP,
            )),
        ],
        [4, 1],
        [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


def choose_tiling(rows: int, n: int, k: int) -> OctetTiling:
    """Pick tiles as measured on an H200 (docs/kernels.md)."""
    if rows <= 64:
        return OctetTiling(max(16, power_of_2(rows)), 5, 12)
    is_large = n * k > 1 << 25 or rows > 256
    if is_large and (rows - 1) % 256 >= 128:  # few rows of the last tile are none
        return OctetTiling(256, 2, 5)
    return OctetTiling(128, 5, 8)


def octet_gemm(
    x_MK: Tensor,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    tiling: OctetTiling | None = None,
    programs: int | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply rows (bfloat16) by the dequantized weight's transpose, in float32; see `octet_trial.takes_groups`."""
    (count, k), (n, words_per_row) = x_MK.shape, weight.words.shape
    if x_MK.stride(0) % 8 or x_MK.data_ptr() % 16:  # tensor maps take rows that begin at multiples of 16 bytes
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    tiling = tiling or choose_tiling(count, n, k)
    out_MN = torch.empty(count, n, dtype=torch.bfloat16, device=x_MK.device)
    columns, steps = ceil_div(n, BLOCK_N), words_per_row // 32
    tiles = columns * ceil_div(count, tiling.block_m)
    programs = programs or fewest_steps(tiles, steps, END)
    if workspace is None:
        workspace = workspace_for(out_MN.device, programs * 2 * BLOCK_N * tiling.block_m, tiles * 2)
    _octet_gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(weight.words, [BLOCK_N, 32], WORD_TILES),
        TensorDescriptor.from_tensor(x_MK, [tiling.block_m, 64], ROW_TILES),
        weight.scales, weight.zeros, bias_N, out_MN, workspace.partials, workspace.counters,
        count, n, weight.scales.shape[1], tiles, columns, steps, out_MN.stride(0),
        ceil_div(weight.group or weight.k, 32), tiling.block_m, BLOCK_N, tiling.word_stages, tiling.row_stages,
        word_layouts(BLOCK_N // 2, 4)[0], scale_layout(BLOCK_N // 2, 4, 4),
        overlaps_launches(out_MN.device), **launch_options(out_MN.device, 4, 1),
    )  # fmt: skip
    return out_MN
