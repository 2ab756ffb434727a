# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Decode products with packed int8, fp8 or int4 weights and activations as they are (weight-only quantization).

Words of four or eight weights are widened in registers (see `packing` for the layout), each part being one operand of
the tensor core: the weights the tall one, the activations the narrow one, padded to 16 rows. For a single row
`quantized_gemv` is faster. Activations for int4 are put in the words' order first: what a part is multiplied by lies 8
bytes here and 8 bytes there, and reading that made int4 slower than bfloat16.

K may be split over programs. The last program of a tile to finish adds the partial sums in split order, so that the
result does not depend on which program that was.
"""

# M rows of activations, N output channels, K input channels

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.layers.arrange import arrange_rows
from mgpu.worker.kernels.products.widen import KINDS, widen_int4, widen_octets
from mgpu.worker.kernels.runtime import (
    HOPPER_SHARED_BYTES,
    INTERPRETED,
    Workspace,
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
    power_of_2,
    shared_bytes,
    wait_for_inputs,
)
from mgpu.worker.quantization.packing import WORDS, PackedWeight, WeightKind

MAX_ROWS = 256
"""Most rows that it takes. `choose.GEMM_ROWS` says up to how many it is the fastest product."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product of few rows is cut."""

    block_n: int
    splits: int
    num_warps: int = 4
    num_stages: int = 5
    most_rows: int = 64
    """Rows of a tile at most, a power of two. Tiles of other rows read the same weights again, from the L2 cache."""

    def block_m(self, rows: int) -> int:
        """Rows of the padded tile."""
        return min(self.most_rows, max(16, power_of_2(rows)))


@triton.jit
def add_partials(acc, partial_ptr, counter_ptr, tile, split, offsets, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """Publish this program's sums; return (sum over splits, 1) in the last program of the tile, else (own sum, 0)."""
    base = partial_ptr + tile * (SPLITS * SIZE)
    tl.store(base + split * SIZE + offsets, acc)
    tl.debug_barrier()  # all threads' stores precede the release below
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    is_last = arrived == SPLITS - 1
    if is_last:
        acc = tl.load(base + offsets, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(base + other * SIZE + offsets, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    return acc, is_last


@triton.jit(do_not_specialize=["M", "blocks_per_split", "row_tiles"])
def _quantized_gemm_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, words_per_row, blocks_per_split, row_tiles, x_stride, y_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_K: tl.constexpr, OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 8 if KIND == 2 else 4
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # Tiles of the same weights are neighbours, so that these are read from memory once.
    n = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, BLOCK_M)
    m = tile % row_tiles * BLOCK_M + slot
    j = tl.arange(0, 32)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, words_per_row // 32)
    wait_for_inputs(OVERLAP)

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    groups = tl.cdiv(K, GROUP) if KIND == 2 else 1
    for block in range(begin, end):
        words = tl.load(w_ptr + rows[:, None] * words_per_row + (block * 32 + j)[None, :])
        if KIND == 2:
            # Groups past the last one are padding, which meets no activations.
            group = tl.minimum((block * 256 + tl.arange(0, 8) * 32) // GROUP, groups - 1)
            pairs = tl.load(scale_ptr + rows[:, None] * groups + group[None, :])
            pairs = tl.reshape(tl.broadcast_to(pairs[:, :, None], [BLOCK_N, 8, 4]), [BLOCK_N, 32])
            parts = widen_int4(words, pairs, dtype, ASSEMBLY)
        else:
            parts = widen_octets(words, KIND, dtype, ASSEMBLY)
        for part in tl.static_range(PARTS):
            k = (block * PARTS + part) * 32 + j
            x_mask = m[None, :] < M
            if not EVEN_K:
                x_mask &= k[:, None] < K
            x = tl.load(x_ptr + m[None, :] * x_stride + k[:, None], mask=x_mask, other=0.0)
            acc = tl.dot(parts[part], x, acc, input_precision="ieee")

    writes = True
    if SPLITS > 1:
        offsets = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + slot[None, :]
        acc, writes = add_partials(acc, partial_ptr, counter_ptr, tile, split, offsets, SPLITS, BLOCK_N * BLOCK_M)
    if KIND != 2:
        acc *= tl.load(scale_ptr + rows)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    tl.store(
        y_ptr + m[None, :] * y_stride + n[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=(m[None, :] < M) & (n[:, None] < N) & writes,
    )


def choose_tiling(
    kind: WeightKind, rows: int, n: int, dtype: torch.dtype = torch.bfloat16, shared: int = HOPPER_SHARED_BYTES
) -> Tiling:
    """Pick tiles by the number of rows and of output channels (see docs/kernels.md), and what fits into ``shared``."""
    tiling = _fastest_tiling(kind, rows, n)
    if dtype.itemsize > 2:  # for correctness; weights of this type go through shared memory too
        tiling = replace(tiling, block_n=64, num_warps=4, most_rows=64)
    step, held = _shared_bytes(kind, tiling, rows, dtype)
    return replace(tiling, num_stages=max(1, min(tiling.num_stages, 1 + (shared - held) // step)))


def _shared_bytes(kind: WeightKind, tiling: Tiling, rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the shared memory of each step that is being loaded, and of the step that is being multiplied."""
    parts, scales = (8, 8) if kind == "int4" else (4, 0)
    weights, activations = tiling.block_n * 32, parts * tiling.block_m(rows) * 32
    step = 4 * (weights + tiling.block_n * scales) + activations * dtype.itemsize
    return step, parts * weights * dtype.itemsize if dtype.itemsize > 2 else 0


def _fastest_tiling(kind: WeightKind, rows: int, n: int) -> Tiling:
    if rows > 64:
        return _many_rows_tiling(kind, n)
    if rows > 16:
        if n > 8192:
            return Tiling(128, 1, 8, 3) if rows > 32 else Tiling(64, 1, num_stages=3 if kind == "int4" else 5)
        # The activations of int4's 256 channels per step fill shared memory: fewer stages, so that two programs fit.
        return Tiling(64, 4, num_stages=3 if kind == "int4" or n > 4096 else 5)
    if n > 8192:
        return Tiling(64, 2, num_stages=3)
    return Tiling(64, 8, num_stages=5 if kind != "int4" and n <= 4096 else 3)


def _many_rows_tiling(kind: WeightKind, n: int) -> Tiling:
    stages = 2 if kind == "int4" else 3
    if n > 8192:
        return Tiling(128, 1, 8, 2, most_rows=128)
    return Tiling(64, 4 if n <= 4096 else 2, num_stages=stages, most_rows=128)


def quantized_gemm(
    x_MK: Tensor,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    tiling: Tiling | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply up to `MAX_ROWS` rows by the dequantized weight's transpose, accumulated in float32.

    ``x_MK`` has contiguous rows; the result has its type.
    """
    rows, k = x_MK.shape
    n, words_per_row = weight.words.shape
    if not 1 <= rows <= MAX_ROWS or k != weight.k:
        raise ValueError(f"quantized_gemm takes 1 to {MAX_ROWS} rows of {weight.k}, got {rows} of {k}")
    blocks = words_per_row // WORDS
    tiling = tiling or choose_tiling(weight.kind, rows, n, x_MK.dtype, shared_bytes(x_MK.device))
    out_MN = torch.empty(rows, n, dtype=x_MK.dtype, device=x_MK.device)
    block_m = tiling.block_m(rows)
    row_tiles = ceil_div(rows, block_m)
    is_int4 = weight.kind == "int4"
    if is_int4:
        x_MK = arrange_rows(x_MK, words_per_row * 8)
    tiles = ceil_div(n, tiling.block_n) * row_tiles
    workspace = workspace or default_workspace(x_MK.device)
    splits = workspace.most_splits(tiling.splits, tiles, tiling.block_n * block_m)
    _quantized_gemm_kernel[(tiles, splits)](
        x_MK, weight.words, weight.scales, bias_N, out_MN, workspace.partials, workspace.counters,
        rows, n, k, words_per_row, ceil_div(blocks, splits), row_tiles, x_MK.stride(0), out_MN.stride(0),
        KINDS[weight.kind], weight.group, splits, block_m, tiling.block_n,
        is_int4 or k == words_per_row * 4, overlaps_launches(x_MK.device), not INTERPRETED,
        **launch_options(x_MK.device, tiling.num_warps, tiling.num_stages),
    )  # fmt: skip
    return out_MN
