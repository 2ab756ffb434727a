# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Grouped products with packed int8, fp8 or int4 weights of experts, widened in registers (see `quantized_gemm`)."""

# P pairs, N outputs and K inputs of one expert

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.experts.gate import CLAMPED, clamped_gate, gated
from mgpu.worker.kernels.experts.sort import SortedPairs, tile_rows
from mgpu.worker.kernels.layers.arrange import arrange_rows
from mgpu.worker.kernels.products.widen import KINDS, widen_int4, widen_octets
from mgpu.worker.kernels.runtime import (
    INTERPRETED,
    ceil_div,
    launch_options,
    overlaps_launches,
    power_of_2,
    wait_for_inputs,
)
from mgpu.worker.quantization.packing import PackedWeight


@dataclass(frozen=True, slots=True)
class PackedTiling:
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _parts(
    w_ptr, scale_ptr, rows, block, groups, words_per_row,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return the parts of a block of words of some rows, widened; for int4 with scale and offset."""
    j = tl.arange(0, 32)
    words = tl.load(w_ptr + rows[:, None] * words_per_row + (block * 32 + j)[None, :])
    if KIND == 2:
        group = tl.minimum((block * 256 + tl.arange(0, 8) * 32) // GROUP, groups - 1)
        pairs = tl.load(scale_ptr + rows[:, None] * groups + group[None, :])
        pairs = tl.reshape(tl.broadcast_to(pairs[:, :, None], [ROWS, 8, 4]), [ROWS, 32])
        parts = widen_int4(words, pairs, DTYPE, ASSEMBLY)
    else:
        parts = widen_octets(words, KIND, DTYPE, ASSEMBLY)
    return parts


@triton.jit
def store_outputs(
    out_ptr, weights_ptr, acc, acc_up, pair, row, n, is_row, N, alpha, limit, GATE: tl.constexpr
):  # fmt: skip
    """Store a tile: gated at the places of sorted pairs, else weighted by the router at those of the pairs."""
    if GATE > 0:
        acc = clamped_gate(acc, acc_up, alpha, limit) if GATE == CLAMPED else gated(acc, acc_up, GATE)
        out_row = row.to(tl.int64) * N
    else:
        acc *= tl.load(weights_ptr + pair, mask=is_row, other=0.0)[None, :]
        out_row = pair.to(tl.int64) * N
    mask = is_row[None, :] & (n < N)[:, None]
    tl.store(out_ptr + out_row[None, :] + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks_n"])
def _packed_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, order_ptr, tiles_ptr, num_tiles_ptr, weights_ptr,
    N, K, words_per_row, blocks_n, x_stride,
    A: tl.constexpr, GATE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // blocks_n
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(OVERLAP)
    if tile >= tl.load(num_tiles_ptr):
        return
    PARTS: tl.constexpr = 8 if KIND == 2 else 4
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    expert, row, is_row, pair = tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M)
    expert = expert.to(tl.int64)
    x_row = (pair // A if GATE > 0 else row).to(tl.int64) * x_stride
    groups = tl.cdiv(K, GROUP) if KIND == 2 else 1
    first = expert * N * (2 if GATE > 0 else 1)
    rows = first + tl.minimum(n, N - 1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(words_per_row // 32):
        parts = _parts(w_ptr, scale_ptr, rows, block, groups, words_per_row, KIND, GROUP, BLOCK_N, dtype, ASSEMBLY)
        if GATE > 0:
            ups = _parts(
                w_ptr, scale_ptr, rows + N, block, groups, words_per_row, KIND, GROUP, BLOCK_N, dtype, ASSEMBLY
            )
        for part in tl.static_range(PARTS):
            k = (block * PARTS + part) * 32 + tl.arange(0, 32)
            mask = is_row[None, :]
            if not EVEN_K:
                mask &= k[:, None] < K
            x = tl.load(x_ptr + x_row[None, :] + k[:, None], mask=mask, other=0.0)
            acc = tl.dot(parts[part], x, acc, input_precision="ieee")
            if GATE > 0:
                acc_up = tl.dot(ups[part], x, acc_up, input_precision="ieee")
    if KIND != 2:
        acc *= tl.load(scale_ptr + rows)[:, None]
        if GATE > 0:
            acc_up *= tl.load(scale_ptr + rows + N)[:, None]
    store_outputs(out_ptr, weights_ptr, acc, acc_up, pair, row, n, is_row, N, 0.0, 0.0, GATE)


def grouped_packed(
    x: Tensor, stack: PackedWeight, pairs: SortedPairs, weights_TA: Tensor, gate: int, tiling: PackedTiling
) -> Tensor:
    """Return what `grouped_gate_up` does, or with ``gate`` 0 `grouped_down`, for a stack of packed weights."""
    _, outputs, words_per_row = stack.words.shape
    n = outputs // 2 if gate else outputs
    is_int4 = stack.kind == "int4"
    is_even = is_int4 or stack.k == words_per_row * 4
    if is_int4:
        x = arrange_rows(x, words_per_row * 8)
    out = torch.empty(weights_TA.numel(), n, dtype=x.dtype, device=x.device)
    block_n = min(tiling.block_n, max(16, power_of_2(n)))
    blocks_n = ceil_div(n, block_n)
    _packed_kernel[(len(pairs.tiles_M4) * blocks_n,)](
        x, stack.words, stack.scales, out, pairs.order_P, pairs.tiles_M4, pairs.num_tiles, weights_TA,
        n, stack.k, words_per_row, blocks_n, x.stride(0),
        weights_TA.shape[1], gate, KINDS[stack.kind], stack.group,
        pairs.block_m, block_n, is_even, overlaps_launches(x.device), not INTERPRETED,
        **launch_options(x.device, tiling.num_warps, tiling.num_stages),
    )  # fmt: skip
    return out
