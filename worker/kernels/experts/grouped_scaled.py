# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Grouped products with packed weights of experts whose groups have scales of their own (see `group_gemm`).

GGUF's types, MXFP4, and groups of GPTQ, AWQ and compressed-tensors with inputs in order. The stack is one tall matrix:
row `expert * outputs + n` is output n of an expert.
"""

# P pairs, N outputs and K inputs of one expert

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.expert_facts import Clamp
from mgpu.worker.kernels.experts.gate import CLAMPED
from mgpu.worker.kernels.experts.grouped_packed import PackedTiling, store_outputs
from mgpu.worker.kernels.experts.sort import SortedPairs, tile_rows
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
from mgpu.worker.kernels.products.widen import widen_octets
from mgpu.worker.kernels.runtime import (
    INTERPRETED,
    ceil_div,
    launch_options,
    overlaps_launches,
    power_of_2,
    shared_bytes,
    wait_for_inputs,
)
from mgpu.worker.quantization.packing import WORDS, PackedWeight

TILING = PackedTiling(num_stages=2)
_TABLES_BYTES = 160 << 10
"""Shared memory that two stages take of a gated product whose codes stand for values of a table."""


def flat_stack(stack: PackedWeight) -> PackedWeight:
    """Return a stack of matrices as one tall matrix; copies nothing."""
    return stack.changed(lambda tensor: tensor.flatten(0, 1))


@triton.jit
def _runs(
    acc, x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows, x_row, is_row, block,
    words_per_row, groups, supers,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add the products of a block of 32 words of eight codes."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    j = tl.arange(0, 32)
    words, high = load_words(w_ptr, high_ptr, rows, block * 32 + j, words_per_row, EVEN)
    k = block * 256 + tl.arange(0, 8) * 32
    scale, bias = group_factors(
        scale_ptr, zero_ptr, offset_ptr, super_ptr, rows, k, groups, supers, KIND, GROUP, SHARED
    )
    scale, bias = of_words(scale, ROWS), of_words(bias, ROWS)
    for part in tl.static_range(8):
        if GROUP == 16 and part == 4:
            scale, bias = group_factors(
                scale_ptr, zero_ptr, offset_ptr, super_ptr, rows, k + 16, groups, supers, KIND, GROUP, SHARED
            )
            scale, bias = of_words(scale, ROWS), of_words(bias, ROWS)
        w = (code_floats(words, high, table_ptr, part, KIND) * scale + bias).to(dtype)
        x = tl.load(x_ptr + x_row[None, :] + ((block * 8 + part) * 32 + j)[:, None], mask=is_row[None, :], other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def _octets(
    acc, x_ptr, w_ptr, scale_ptr, zero_ptr, rows, x_row, is_row, block, K, words_per_row, groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, EVEN_K: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Add the products of a block of 32 words of four weights."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    j = tl.arange(0, 32)
    words = tl.load(w_ptr + rows[:, None] * words_per_row + (block * 32 + j)[None, :])
    parts = widen_octets(words, KIND, dtype, ASSEMBLY)
    AFTER: tl.constexpr = (GROUP == 0 or GROUP % 128 == 0) and zero_ptr is None
    products = tl.zeros_like(acc)
    for part in tl.static_range(4):
        k = (block * 4 + part) * 32 + j
        mask = is_row[None, :]
        if not EVEN_K:
            mask &= k[:, None] < K
        x = tl.load(x_ptr + x_row[None, :] + k[:, None], mask=mask, other=0.0)
        if AFTER:
            products = tl.dot(parts[part], x, products, input_precision="ieee")
        else:
            group = tl.minimum((block * 128 + part * 32) // GROUP, groups - 1) if GROUP > 0 else 0
            scale = load_scale(scale_ptr + (rows // SHARED) * groups + group, rows >= 0)
            w = parts[part]
            if zero_ptr is not None:
                w -= tl.load(zero_ptr + rows * groups + group).to(dtype)[:, None]
            acc += tl.dot(w, x, input_precision="ieee") * scale[:, None]
    if AFTER:  # all inputs of a block have one scale
        group = tl.minimum(block * 128 // GROUP, groups - 1) if GROUP > 0 else 0
        acc += products * load_scale(scale_ptr + (rows // SHARED) * groups + group, rows >= 0)[:, None]
    return acc


@triton.jit(do_not_specialize=["blocks_n", "alpha", "limit"])
def _scaled_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, bias_ptr, out_ptr, order_ptr,
    tiles_ptr, num_tiles_ptr, weights_ptr,
    N, K, words_per_row, groups, supers, blocks_n, x_stride, alpha, limit,
    A: tl.constexpr, GATE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // blocks_n
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(OVERLAP)
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, row, is_row, pair = tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M)
    expert = expert.to(tl.int64)
    x_row = (pair // A if GATE > 0 else row).to(tl.int64) * x_stride
    rows = expert * N * (2 if GATE > 0 else 1) + tl.minimum(n, N - 1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range((words_per_row + 31) // 32):
        if KIND >= 2:
            acc = _runs(
                acc, x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows, x_row, is_row,
                block, words_per_row, groups, supers, KIND, GROUP, SHARED, BLOCK_N, EVEN,
            )  # fmt: skip
            if GATE > 0:
                acc_up = _runs(
                    acc_up, x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows + N,
                    x_row, is_row, block, words_per_row, groups, supers, KIND, GROUP, SHARED, BLOCK_N, EVEN,
                )  # fmt: skip
        else:
            acc = _octets(
                acc, x_ptr, w_ptr, scale_ptr, zero_ptr, rows, x_row, is_row, block, K, words_per_row, groups,
                KIND, GROUP, SHARED, EVEN_K, ASSEMBLY,
            )  # fmt: skip
            if GATE > 0:
                acc_up = _octets(
                    acc_up, x_ptr, w_ptr, scale_ptr, zero_ptr, rows + N, x_row, is_row, block, K, words_per_row, groups,
                    KIND, GROUP, SHARED, EVEN_K, ASSEMBLY,
                )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
        if GATE > 0:
            acc_up += tl.load(bias_ptr + rows + N).to(tl.float32)[:, None]
    store_outputs(out_ptr, weights_ptr, acc, acc_up, pair, row, n, is_row, N, alpha, limit, GATE)


def grouped_scaled(
    x: Tensor,
    stack: PackedWeight,
    pairs: SortedPairs,
    weights_TA: Tensor,
    gate: int,
    *,
    bias_NO: Tensor | None = None,
    clamp: Clamp | None = None,
    tiling: PackedTiling = TILING,
) -> Tensor:
    """Return what `grouped_packed` does, for a stack of weights whose groups have scales.

    ``bias_NO``: the biases of each expert, before the gate or the router's weight. ``clamp``: the gate is gpt-oss'.
    """
    _, outputs, words_per_row = stack.words.shape
    n, flat = outputs // 2 if gate else outputs, flat_stack(stack)
    if stack.kind in RUN_KINDS:
        x = arrange_rows(x, ceil_div(words_per_row, WORDS) * 256)
    out = torch.empty(weights_TA.numel(), n, dtype=x.dtype, device=x.device)
    block_n = min(tiling.block_n if x.dtype.itemsize == 2 else 32, max(16, power_of_2(n)))
    blocks_n = ceil_div(n, block_n)
    given = group_arguments(flat)
    stages = 1 if stack.kind == "nl4" and shared_bytes(x.device) < _TABLES_BYTES else tiling.num_stages
    limits = (0.0, 0.0) if clamp is None else (clamp.alpha, clamp.limit)
    _scaled_kernel[(len(pairs.tiles_M4) * blocks_n,)](
        x, flat.words, *given.tensors, bias_NO, out, pairs.order_P, pairs.tiles_M4, pairs.num_tiles, weights_TA,
        n, stack.k, words_per_row, *given.sizes, blocks_n, x.stride(0), *limits,
        weights_TA.shape[1], CLAMPED.value if gate and clamp else gate, *given.constants,
        pairs.block_m, block_n, words_per_row % WORDS == 0, stack.k == words_per_row * 4,
        overlaps_launches(x.device), not INTERPRETED,
        **launch_options(x.device, tiling.num_warps, stages),
    )  # fmt: skip
    return out
