# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Products of several rows with weights whose groups have scales of their own, widened in registers.

As in `quantized_gemm`, each part of the words is one operand of the tensor core: the weights the tall one, the
activations the narrow one. A word of eight codes is in one group (or in two), so its weights are scaled before they are
multiplied. A part of words of four weights is 32 neighbouring inputs, so its product is scaled after it, in float32.
Multiplying all parts of a step at once, brought into the order of words, took almost twice as long.
"""

# M rows of activations, N output channels, K input channels

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.layers.arrange import arrange_rows
from mgpu.worker.kernels.products.dequantize_scaled import load_scale
from mgpu.worker.kernels.products.group_parts import (
    RUN_KINDS,
    code_floats,
    group_arguments,
    group_factors,
    load_words,
    of_words,
)
from mgpu.worker.kernels.products.quantized_gemm import Tiling, add_partials
from mgpu.worker.kernels.products.widen import widen_octets
from mgpu.worker.kernels.runtime import (
    HOPPER_SHARED_BYTES,
    INTERPRETED,
    Workspace,
    ceil_div,
    default_workspace,
    launch_options,
    overlaps_launches,
    shared_bytes,
    wait_for_inputs,
)
from mgpu.worker.quantization.packing import WORDS, PackedWeight

_MANY_OUTPUTS = 8192
"""With more, tiles fill the GPU without cutting the inputs."""


@triton.jit
def _load_rows(x_ptr, m, M, k, K, x_stride, EVEN_K: tl.constexpr):
    """Return activations [len(k), len(m)], zeros past the last row and input."""
    mask = m[None, :] < M
    if not EVEN_K:
        mask &= k[:, None] < K
    return tl.load(x_ptr + m[None, :] * x_stride + k[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["M", "blocks_per_split", "row_tiles"])
def _group_gemm_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, bias_ptr, y_ptr,
    partial_ptr, counter_ptr,
    M, N, K, words_per_row, groups, supers, blocks_per_split, row_tiles, x_stride, y_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    AFTER: tl.constexpr = (GROUP == 0 or GROUP % 128 == 0) and zero_ptr is None
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # Tiles of the same weights are neighbours, so that these are read from memory once.
    n = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, BLOCK_M)
    m = tile % row_tiles * BLOCK_M + slot
    j = tl.arange(0, 32)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, (words_per_row + 31) // 32)
    wait_for_inputs(OVERLAP)

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(begin, end):
        words, high = load_words(w_ptr, high_ptr, rows, block * 32 + j, words_per_row, EVEN)
        if KIND >= 2:
            k = block * 256 + tl.arange(0, 8) * 32
            scale, bias = group_factors(
                scale_ptr, zero_ptr, offset_ptr, super_ptr, rows, k, groups, supers, KIND, GROUP, SHARED
            )
            scale, bias = of_words(scale, BLOCK_N), of_words(bias, BLOCK_N)
            for part in tl.static_range(8):
                if GROUP == 16 and part == 4:
                    scale, bias = group_factors(
                        scale_ptr, zero_ptr, offset_ptr, super_ptr, rows, k + 16, groups, supers, KIND, GROUP, SHARED
                    )
                    scale, bias = of_words(scale, BLOCK_N), of_words(bias, BLOCK_N)
                w = (code_floats(words, high, table_ptr, part, KIND) * scale + bias).to(dtype)
                x = _load_rows(x_ptr, m, M, (block * 8 + part) * 32 + j, K, x_stride, True)
                acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            parts = widen_octets(words, KIND, dtype, ASSEMBLY)
            products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(4):
                x = _load_rows(x_ptr, m, M, (block * 4 + part) * 32 + j, K, x_stride, EVEN_K)
                if AFTER:
                    products = tl.dot(parts[part], x, products, input_precision="ieee")
                else:
                    group = tl.minimum((block * 128 + part * 32) // GROUP, groups - 1) if GROUP > 0 else 0
                    scale = load_scale(scale_ptr + (rows // SHARED) * groups + group, rows >= 0)
                    w = parts[part]
                    if zero_ptr is not None:
                        w -= tl.load(zero_ptr + rows * groups + group).to(dtype)[:, None]
                    acc += tl.dot(w, x, input_precision="ieee") * scale[:, None]
            if AFTER:  # one scale per output for all inputs of a block
                group = tl.minimum(block * 128 // GROUP, groups - 1) if GROUP > 0 else 0
                acc += products * load_scale(scale_ptr + (rows // SHARED) * groups + group, rows >= 0)[:, None]

    is_done = 1
    if SPLITS > 1:
        offsets = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + slot[None, :]
        acc, is_last = add_partials(acc, partial_ptr, counter_ptr, tile, split, offsets, SPLITS, BLOCK_N * BLOCK_M)
        is_done = is_last.to(tl.int32)
    if is_done:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
        mask = (m < M)[None, :] & (n < N)[:, None]
        tl.store(y_ptr + m[None, :] * y_stride + n[:, None], acc.to(dtype), mask=mask)


def most_rows(weight: PackedWeight) -> int:
    """Return the rows up to which `group_gemm` is faster than dequantizing once and a library's product."""
    if len(weight.words) <= _MANY_OUTPUTS:
        return 64
    return 256 if weight.kind == "fp8" else 128


def choose_tiling(
    weight: PackedWeight, rows: int, dtype: torch.dtype = torch.bfloat16, shared: int = HOPPER_SHARED_BYTES
) -> Tiling:
    """Pick tiles as measured on an H200 (docs/kernels.md), and what fits into ``shared``."""
    tiling = _fastest_tiling(weight, rows)
    if dtype.itemsize > 2:  # for correctness; weights of this type go through shared memory too
        tiling = replace(tiling, block_n=32, num_warps=4, most_rows=16)
    inputs = 256 if weight.kind in RUN_KINDS else 128
    step = dtype.itemsize * inputs * tiling.block_m(rows) + 6 * tiling.block_n * 32
    held = (dtype.itemsize * 32 + 64) * tiling.block_n * (1 if dtype.itemsize == 2 else inputs // 32)
    most = (shared - held) // step
    if weight.kind == "nl4":  # what codes stand for comes through shared memory, for all stages but one
        most = 1 + (shared - held) // (step + 4 * 256 * tiling.block_n)
    if weight.kind == "int8" and tiling.block_n == 128 and shared < HOPPER_SHARED_BYTES:
        most = 1  # with two, an A100's threads spill 3 KB of registers
    return replace(tiling, num_stages=max(1, min(tiling.num_stages, most)))


def _fastest_tiling(weight: PackedWeight, rows: int) -> Tiling:
    is_wide, is_fp8 = len(weight.words) > _MANY_OUTPUTS, weight.kind == "fp8"
    if rows <= 16:
        return Tiling(64, 4 if is_wide else 8, num_stages=3)
    if not is_wide:
        return Tiling(64, 4, num_stages=3)
    if rows <= 64 and is_fp8:
        return Tiling(128, 2, num_warps=8, num_stages=3)
    if rows <= 64:
        return Tiling(64, 1 if weight.kind != "int8" else 4, num_stages=3)
    if is_fp8:
        return Tiling(64, 1, num_stages=2, most_rows=128)
    return Tiling(128, 1, num_warps=8, num_stages=2, most_rows=128)


def group_gemm(
    x_MK: Tensor,
    weight: PackedWeight,
    *,
    bias_N: Tensor | None = None,
    tiling: Tiling | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Multiply rows by the dequantized weight's transpose, accumulated in float32; see `takes`."""
    rows, k = x_MK.shape
    n, words_per_row = weight.words.shape
    tiling = tiling or choose_tiling(weight, rows, x_MK.dtype, shared_bytes(x_MK.device))
    blocks = ceil_div(words_per_row, WORDS)
    out_MN = torch.empty(rows, n, dtype=x_MK.dtype, device=x_MK.device)
    block_m = tiling.block_m(rows)
    row_tiles = ceil_div(rows, block_m)
    tiles = ceil_div(n, tiling.block_n) * row_tiles
    workspace = workspace or default_workspace(x_MK.device)
    splits = workspace.most_splits(tiling.splits, tiles, tiling.block_n * block_m)
    if weight.kind in RUN_KINDS:
        x_MK = arrange_rows(x_MK, blocks * 256)
    given = group_arguments(weight)
    _group_gemm_kernel[(tiles, splits)](
        x_MK, weight.words, *given.tensors, bias_N, out_MN, workspace.partials, workspace.counters,
        rows, n, k, words_per_row, *given.sizes, ceil_div(blocks, splits), row_tiles,
        x_MK.stride(0), out_MN.stride(0),
        *given.constants, splits, block_m, tiling.block_n,
        words_per_row % WORDS == 0, k == words_per_row * 4,
        overlaps_launches(x_MK.device), not INTERPRETED,
        **launch_options(x_MK.device, tiling.num_warps, tiling.num_stages),
    )  # fmt: skip
    return out_MN
