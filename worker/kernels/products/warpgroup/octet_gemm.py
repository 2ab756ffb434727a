# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of many rows with int8 weights whose groups have scales, on Hopper: weights are widened in registers.

Words and activations come through tensor maps, each into a ring. A part of a block of words is 32 neighbouring
channels, so activations stay in order. While the tensor core multiplies two parts, the next two are widened, with their
scale: a weight is rounded to bfloat16, as dequantizing does, and its scale as well.
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
from mgpu.worker.kernels.products.warpgroup.widen import twice, word_layouts
from mgpu.worker.kernels.runtime import (
    HOPPER_SMS,
    Workspace,
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
)
from mgpu.worker.quantization.packing import PackedWeight

STEP = 128
"""Channels of a step: a block of 32 words."""
WORD_TILES = gl.NVMMASharedLayout(128, 32, rank=2)
ROW_TILES = gl.NVMMASharedLayout(128, 16, rank=2)
FEW_ROWS = 512
"""With more, no product is cut along K: there are tiles enough."""


@dataclass(frozen=True, slots=True)
class OctetTiling:
    """How a product is cut; a tile has 128 outputs."""

    block_m: int = 128
    splits: int = 1
    word_stages: int = 3
    row_stages: int = 6
    """Steps of 64 channels in the ring of activations."""


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
def _load_factors(scale_ptr, zero_ptr, rows, block, groups, GROUP: gl.constexpr, PART: gl.constexpr):
    """Return scale and zero of the group that a part of a step is in, a number for each row, twice in a word."""
    if GROUP == 0:
        group = block * 0
    elif GROUP >= 128:
        group = gl.minimum(block // (GROUP // 128), groups - 1)
    else:
        group = gl.minimum(block * (128 // GROUP) + PART * 32 // GROUP, groups - 1)
    scale = twice(gl.load(scale_ptr + rows * groups + group).to(gl.float32))
    zero = scale
    if zero_ptr is not None:
        zero = twice(gl.load(zero_ptr + rows * groups + group).to(gl.float32))
    return scale, zero


@gluon.jit
def _wide(numbers, ROWS: gl.constexpr, WORDS: gl.constexpr):
    spread, _ = gl.broadcast(gl.expand_dims(numbers, 1), gl.full([ROWS, 32], 0, gl.int32, layout=WORDS))
    return spread


@gluon.jit
def _load_all(scale_ptr, zero_ptr, rows, block, groups, GROUP: gl.constexpr):
    """Return the scales and zeros of the four parts of a step, where they differ."""
    s0, z0 = _load_factors(scale_ptr, zero_ptr, rows, block, groups, GROUP, 0)
    s1, z1, s2, z2, s3, z3 = s0, z0, s0, z0, s0, z0
    if GROUP == 32 or GROUP == 64:
        s2, z2 = _load_factors(scale_ptr, zero_ptr, rows, block, groups, GROUP, 2)
        s3, z3 = s2, z2
    if GROUP == 32:
        s1, z1 = _load_factors(scale_ptr, zero_ptr, rows, block, groups, GROUP, 1)
        s3, z3 = _load_factors(scale_ptr, zero_ptr, rows, block, groups, GROUP, 3)
    return s0, z0, s1, z1, s2, z2, s3, z3


@gluon.jit(do_not_specialize=["M", "groups", "steps", "steps_per_split", "row_tiles"])
def _octet_gemm_kernel(
    x_tiles, w_tiles, scale_ptr, zero_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, groups, steps, steps_per_split, row_tiles, y_stride,
    GROUP: gl.constexpr, SPLITS: gl.constexpr, BLOCK_M: gl.constexpr, WORD_STAGES: gl.constexpr,
    ROW_STAGES: gl.constexpr, WORDS: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    HAS_ZERO: gl.constexpr = zero_ptr is not None
    ROW_AHEAD: gl.constexpr = ROW_STAGES - 1
    tile, split = gl.program_id(0), gl.program_id(1)
    first_n = tile // row_tiles * 128
    first_m = tile % row_tiles * BLOCK_M
    begin = split * steps_per_split
    end = gl.minimum(begin + steps_per_split, steps)
    ws = gl.allocate_shared_memory(gl.int32, [WORD_STAGES, 128, 32], w_tiles.layout)
    xs = gl.allocate_shared_memory(gl.bfloat16, [ROW_STAGES, BLOCK_M, 64], x_tiles.layout)
    w_full = gl.allocate_shared_memory(gl.int64, [WORD_STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [ROW_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(WORD_STAGES):
        mbarrier.init(w_full.index(stage), count=1)
    for stage in gl.static_range(ROW_STAGES):
        mbarrier.init(x_full.index(stage), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for stage in gl.static_range(WORD_STAGES):  # weights are no other kernel's results
        if begin + stage < end:
            mbarrier.expect(w_full.index(stage), 128 * 128)
            tma.async_copy_global_to_shared(
                w_tiles, [first_n, (begin + stage) * 32], w_full.index(stage), ws.index(stage)
            )
    if OVERLAP:
        let_next_start()
        wait_for_earlier()
    for stage in gl.static_range(ROW_AHEAD):
        if begin * 2 + stage < end * 2:
            mbarrier.expect(x_full.index(stage), BLOCK_M * 128)
            at = [first_m, (begin * 2 + stage) * 64]
            tma.async_copy_global_to_shared(x_tiles, at, x_full.index(stage), xs.index(stage))
    rows = gl.minimum(first_n + gl.arange(0, 128, layout=gl.SliceLayout(1, WORDS)), N - 1)
    s0, z0, s1, z1, s2, z2, s3, z3 = _load_all(scale_ptr, zero_ptr, rows, begin, groups, GROUP)
    acc = gl.zeros([128, BLOCK_M], gl.float32, SUMS)
    last_low = gl.zeros([128, 32], gl.bfloat16, OPERAND)
    last_high = last_low
    for block in range(begin, end):
        i = block - begin
        slot = i % WORD_STAGES
        mbarrier.wait(w_full.index(slot), i // WORD_STAGES & 1)
        words = ws.index(slot).load(WORDS)
        low = _widen(words, _wide(s0, 128, WORDS), _wide(z0, 128, WORDS), 0, HAS_ZERO, OPERAND)
        high = _widen(words, _wide(s1, 128, WORDS), _wide(z1, 128, WORDS), 1, HAS_ZERO, OPERAND)
        for half in gl.static_range(2):
            turn = i * 2 + half
            mbarrier.wait(x_full.index(turn % ROW_STAGES), turn // ROW_STAGES & 1)
            x = xs.index(turn % ROW_STAGES).permute((1, 0))
            acc = warpgroup_mma(low, x.slice(0, 32, dim=0), acc, is_async=True)
            acc = warpgroup_mma(high, x.slice(32, 32, dim=0), acc, is_async=True)
            acc, _, _ = warpgroup_mma_wait(2, deps=[acc, last_low, last_high])
            last_low, last_high = low, high
            gl.thread_barrier()  # all warps are done with the half before, and have loaded their words
            ahead = turn + ROW_AHEAD
            if begin * 2 + ahead < end * 2:
                mbarrier.expect(x_full.index(ahead % ROW_STAGES), BLOCK_M * 128)
                at = [first_m, (begin * 2 + ahead) * 64]
                place = ahead % ROW_STAGES
                tma.async_copy_global_to_shared(x_tiles, at, x_full.index(place), xs.index(place))
            if half == 0:
                if block + WORD_STAGES < end:
                    mbarrier.expect(w_full.index(slot), 128 * 128)
                    at = [first_n, (block + WORD_STAGES) * 32]
                    tma.async_copy_global_to_shared(w_tiles, at, w_full.index(slot), ws.index(slot))
                low = _widen(words, _wide(s2, 128, WORDS), _wide(z2, 128, WORDS), 2, HAS_ZERO, OPERAND)
                high = _widen(words, _wide(s3, 128, WORDS), _wide(z3, 128, WORDS), 3, HAS_ZERO, OPERAND)
                if GROUP != 0:
                    following = gl.minimum(block + 1, steps - 1)
                    s0, z0, s1, z1, s2, z2, s3, z3 = _load_all(scale_ptr, zero_ptr, rows, following, groups, GROUP)
    acc, _, _ = warpgroup_mma_wait(0, deps=[acc, last_low, last_high])
    is_done = 1
    if SPLITS > 1:
        places = block_places(SUMS, 128, BLOCK_M, 8)
        acc, is_done = add_splits(acc, partial_ptr, counter_ptr, tile, split, places, SPLITS, 128 * BLOCK_M)
    if is_done:
        store_tile(acc, bias_ptr, y_ptr, first_n, first_m, M, N, y_stride, SUMS, num_warps, True)


def choose_tiling(rows: int, n: int, k: int) -> OctetTiling:
    """Pick tiles (docs/kernels.md); how K is cut follows from the steps that the busiest multiprocessor has."""
    block_m = 128 if rows <= 128 else 256
    tiles, steps = ceil_div(n, 128) * ceil_div(rows, block_m), ceil_div(k, STEP)

    def cost(splits: int) -> int:
        return ceil_div(tiles * splits, HOPPER_SMS) * (ceil_div(steps, splits) + 4 + 4 * (splits > 1))

    splits = min((1, 2, 4), key=cost) if rows <= FEW_ROWS else 1
    return OctetTiling(block_m, splits, 3, 5) if block_m > 128 else OctetTiling(block_m, splits, 4, 8)


def octet_gemm(
    x_MK: Tensor,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    tiling: OctetTiling | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply rows (bfloat16) by the dequantized weight's transpose, in float32; see `octet_trial.takes_groups`."""
    (count, k), (n, words_per_row) = x_MK.shape, weight.words.shape
    if x_MK.stride(0) % 8 or x_MK.data_ptr() % 16:  # tensor maps take rows that begin at multiples of 16 bytes
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    tiling = tiling or choose_tiling(count, n, k)
    out_MN = torch.empty(count, n, dtype=torch.bfloat16, device=x_MK.device)
    row_tiles, steps = ceil_div(count, tiling.block_m), words_per_row // 32
    tiles = ceil_div(n, 128) * row_tiles
    workspace = workspace or default_workspace(out_MN.device)
    splits = workspace.most_splits(tiling.splits, tiles, 128 * tiling.block_m)
    _octet_gemm_kernel[(tiles, splits)](
        TensorDescriptor.from_tensor(x_MK, [tiling.block_m, 64], ROW_TILES),
        TensorDescriptor.from_tensor(weight.words, [128, 32], WORD_TILES),
        weight.scales, weight.zeros, bias_N, out_MN, workspace.partials, workspace.counters,
        count, n, weight.scales.shape[1], steps, ceil_div(steps, splits), row_tiles, out_MN.stride(0),
        weight.group, splits, tiling.block_m, tiling.word_stages, tiling.row_stages, word_layouts(128, 8)[0],
        overlaps_launches(out_MN.device), **launch_options(out_MN.device, 8, 1),
    )  # fmt: skip
    return out_MN
