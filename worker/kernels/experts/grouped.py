# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Grouped products: each tile of rows is multiplied by the weights of its expert.

The rows are pairs of token and expert in the order that `sort_pairs` made, so that a tile has rows of one expert and no
row is padding but the last ones of an expert. The product with gate and up gathers its rows from the tokens and
applies the activation. The product with `down` scatters its rows to the places of their pairs, multiplied by the
router's weights; `PairRows` adds up the rows of each token.

Tiles of few rows are the narrow operand of the tensor core and the weights the tall one; tiles of many rows are the
tall one themselves.
"""

# T tokens, D model dim, P pairs, M tiles, N outputs and K inputs of one expert

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mgpu.worker.kernels.experts.gate import gated
from mgpu.worker.kernels.experts.sort import SortedPairs, tile_rows
from mgpu.worker.kernels.runtime import (
    INTERPRETED,
    ceil_div,
    launch_options,
    overlaps_launches,
    power_of_2,
    shared_bytes,
    wait_for_inputs,
)

_NARROW = 64
"""Tiles of fewer rows are the narrow operand."""


@dataclass(frozen=True, slots=True)
class GroupedTiling:
    """Outputs and inputs of a program at once; with a gate, as many outputs of gate and of up."""

    block_n: int
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 4
    bulk: bool = True
    """Load weights through a tensor map, where there are such."""


@triton.jit
def _weights(w, first, n, k, N, K, NARROW: tl.constexpr, BULK: tl.constexpr):
    """Return a tile of one expert's weights: [n, k], or [k, n] if the rows are the tall operand."""
    if BULK:
        tile = w.load([first + tl.min(n, 0), tl.min(k, 0)])
    else:
        mask = (n < N)[:, None] & (k < K)[None, :]
        tile = tl.load(w + (first + n).to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)
    if not NARROW:
        tile = tl.trans(tile)
    return tile


@triton.jit
def _product(w, x, acc, NARROW: tl.constexpr):
    if NARROW:  # noqa: SIM108 - compile-time condition
        acc = tl.dot(w, x, acc, input_precision="ieee")
    else:
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _rows(x_ptr, x_row, is_row, k, K, NARROW: tl.constexpr):
    """Return a tile of rows: [k, rows] if they are the narrow operand, else [rows, k]."""
    if NARROW:
        tile = tl.load(x_ptr + x_row[None, :] + k[:, None], mask=is_row[None, :] & (k < K)[:, None], other=0.0)
    else:
        tile = tl.load(x_ptr + x_row[:, None] + k[None, :], mask=is_row[:, None] & (k < K)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["blocks_n"])
def _grouped_kernel(
    x_ptr, w, out_ptr, order_ptr, tiles_ptr, num_tiles_ptr, weights_ptr,
    N, K, blocks_n, x_stride,
    A: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NARROW: tl.constexpr, BULK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    FACTOR: tl.constexpr = 2 if GATE > 0 else 1
    tile = tl.program_id(0) // blocks_n
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    wait_for_inputs(OVERLAP)
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, row, is_row, pair = tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    # The product with gate and up reads a token's row, that with down the row of the one before.
    x_row = (pair // A if GATE > 0 else row).to(tl.int64) * x_stride
    first = expert * N * FACTOR
    SHAPE_0: tl.constexpr = BLOCK_N if NARROW else BLOCK_M
    SHAPE_1: tl.constexpr = BLOCK_M if NARROW else BLOCK_N
    acc = tl.zeros([SHAPE_0, SHAPE_1], tl.float32)
    acc_up = tl.zeros([SHAPE_0, SHAPE_1], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        rows = _rows(x_ptr, x_row, is_row, k, K, NARROW)
        acc = _product(_weights(w, first, n, k, N, K, NARROW, BULK), rows, acc, NARROW)
        if GATE > 0:
            acc_up = _product(_weights(w, first + N, n, k, N, K, NARROW, BULK), rows, acc_up, NARROW)
    if GATE > 0:
        acc = gated(acc, acc_up, GATE)
        out_row = row.to(tl.int64) * N
    else:
        weight = tl.load(weights_ptr + pair, mask=is_row, other=0.0)
        acc *= weight[None, :] if NARROW else weight[:, None]
        out_row = pair.to(tl.int64) * N
    acc = acc.to(out_ptr.dtype.element_ty)
    if NARROW:
        tl.store(out_ptr + out_row[None, :] + n[:, None], acc, mask=is_row[None, :] & (n < N)[:, None])
    else:
        tl.store(out_ptr + out_row[:, None] + n[None, :], acc, mask=is_row[:, None] & (n < N)[None, :])


def _is_bulk(matrix: Tensor, tiling: GroupedTiling) -> bool:
    """Return whether a tensor map can describe the rows of a stack of weights."""
    is_aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(-2) * matrix.dtype.itemsize % 16 == 0
    return tiling.bulk and is_aligned and not INTERPRETED and overlaps_launches(matrix.device)


def fitting_stages(tiling: GroupedTiling, step_bytes: int, bulk: bool, shared: int) -> int:
    """Return the stages that fit into ``shared`` bytes. A tensor map fills all of them, other loads one less."""
    return max(1, min(tiling.num_stages, shared // step_bytes + (0 if bulk else 1)))


def _launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    pairs: SortedPairs,
    weights_TA: Tensor,
    gate: int,
    tiling: GroupedTiling,
) -> None:
    count, outputs, k = weight.shape
    n = outputs // 2 if gate else outputs
    block_n = min(tiling.block_n, max(16, power_of_2(n)))
    block_k = min(tiling.block_k, max(16, power_of_2(k)))
    bulk, narrow = _is_bulk(weight, tiling), pairs.block_m < _NARROW
    blocks_n = ceil_div(n, block_n)
    step_bytes = (pairs.block_m + block_n * (2 if gate else 1)) * block_k * x.element_size()
    stages = fitting_stages(tiling, step_bytes, bulk, shared_bytes(x.device))
    w = TensorDescriptor.from_tensor(weight.view(count * outputs, k), [block_n, block_k]) if bulk else weight
    _grouped_kernel[(len(pairs.tiles_M4) * blocks_n,)](
        x, w, out, pairs.order_P, pairs.tiles_M4, pairs.num_tiles, weights_TA,
        n, k, blocks_n, x.stride(0),
        weights_TA.shape[1], gate, pairs.block_m, block_n, block_k,
        narrow, bulk, overlaps_launches(x.device),
        **launch_options(x.device, tiling.num_warps, stages),
    )  # fmt: skip


def grouped_gate_up(
    x_TD: Tensor, weight: Tensor, pairs: SortedPairs, weights_TA: Tensor, gate: int, tiling: GroupedTiling
) -> Tensor:
    """Return act(gate(x)) * up(x) of every pair of this rank, in sorted order, [P, width]."""
    out = torch.empty(weights_TA.numel(), weight.shape[1] // 2, dtype=x_TD.dtype, device=x_TD.device)
    _launch(x_TD, weight, out, pairs, weights_TA, gate, tiling)
    return out


def grouped_down(h_PF: Tensor, weight: Tensor, pairs: SortedPairs, weights_TA: Tensor, tiling: GroupedTiling) -> Tensor:
    """Return each pair's output times its weight, at the pair's place, [P, D]; undefined for other ranks' pairs."""
    out = torch.empty(weights_TA.numel(), weight.shape[1], dtype=h_PF.dtype, device=h_PF.device)
    _launch(h_PF, weight, out, pairs, weights_TA, 0, tiling)
    return out
