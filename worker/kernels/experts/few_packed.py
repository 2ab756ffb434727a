# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Experts of a few tokens with packed weights: as `few.py`, but each pair of token and expert has a row of its own.

A program has some outputs of one pair, and reads the words of its expert straight to registers. Which expert that is
follows from the pair, so nothing is sorted. Biases, gates, limits of gates and the router's weights are applied to the
sums; the next norm adds up the rows of a token's experts (`combine.py`).
"""

# P pairs, N outputs and K inputs of one expert, A active experts of a token

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.expert_facts import Clamp
from mgpu.worker.kernels.experts.gate import CLAMPED, clamped_gate, gated
from mgpu.worker.kernels.products.gemv import weight_rows
from mgpu.worker.kernels.products.group_parts import RUN_KINDS, group_arguments
from mgpu.worker.kernels.products.group_rows import load_row_words, multiply_words
from mgpu.worker.kernels.runtime import (
    ceil_div,
    launch_options,
    overlaps_launches,
    uses_assembly,
    wait_for_inputs,
)
from mgpu.worker.quantization.packing import PackedWeight


@dataclass(frozen=True, slots=True)
class FewPackedTiling:
    """How a product is cut."""

    block_n: int
    """Rows of the weight per program; even where it is gated."""
    block_w: int
    """Words per step."""
    num_warps: int


@triton.jit(do_not_specialize=["first_expert", "alpha", "limit"])
def _few_packed_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, bias_ptr, out_ptr,
    experts_ptr, weights_ptr,
    first_expert, count, N, K, words_per_row, groups, supers, x_stride, alpha, limit,
    A: tl.constexpr, GATE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N outputs of a pair; EVEN as in `multiply_words`."""
    pair = tl.program_id(1)
    wait_for_inputs(OVERLAP)
    expert = tl.load(experts_ptr + pair) - first_expert
    if (expert >= 0) & (expert < count):
        rows = weight_rows(N, GATE, BLOCK_N) + expert.to(tl.int64) * N * (2 if GATE > 0 else 1)
        words, high = load_row_words(w_ptr, high_ptr, rows, tl.arange(0, BLOCK_W), words_per_row, K, KIND, EVEN)
        x_ptr += (pair // A if GATE > 0 else pair).to(tl.int64) * x_stride
        y = multiply_words(
            words, high, x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows,
            K, words_per_row, groups, supers, KIND, GROUP, SHARED, BLOCK_N, BLOCK_W, EVEN, ASSEMBLY,
        )  # fmt: skip
        if bias_ptr is not None:
            y += tl.load(bias_ptr + rows).to(tl.float32)
        if GATE > 0:
            gate, up = tl.split(tl.reshape(y, [BLOCK_N // 2, 2]))
            y = clamped_gate(gate, up, alpha, limit) if GATE == CLAMPED else gated(gate, up, GATE)
            n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        else:
            y *= tl.load(weights_ptr + pair)
            n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + pair.to(tl.int64) * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


def choose_tiling(stack: PackedWeight) -> FewPackedTiling:
    """Pick tiles (see docs/kernels.md). A step that is not whole costs as much as one that is."""
    return FewPackedTiling(8, 128 if stack.kind in RUN_KINDS or stack.k % 512 == 0 else 64, 1)


def few_packed(
    x: Tensor,
    stack: PackedWeight,
    routing: tuple[Tensor, Tensor],
    first_expert: int,
    gate: int,
    *,
    bias_NO: Tensor | None = None,
    clamp: Clamp | None = None,
    tiling: FewPackedTiling | None = None,
) -> Tensor:
    """Return a row for each pair of token and expert, in their order, [P, N]; undefined for experts of other ranks.

    With ``gate`` x has a row for each token, and outputs are act(gate) * up. Else x has a row for each pair, and
    outputs are multiplied by the router's weights. ``bias_NO`` and ``clamp`` as in `grouped_scaled`.
    """
    experts_TA, weights_TA = routing
    count, outputs, words_per_row = stack.words.shape
    n = outputs // 2 if gate else outputs
    tiling = tiling or choose_tiling(stack)
    given = group_arguments(stack.changed(lambda tensor: tensor.flatten(0, 1)))
    codes = 8 if stack.kind in RUN_KINDS else 4
    limits = (0.0, 0.0) if clamp is None else (clamp.alpha, clamp.limit)
    out = torch.empty(experts_TA.numel(), n, dtype=x.dtype, device=x.device)
    _few_packed_kernel[(ceil_div(outputs, tiling.block_n), experts_TA.numel())](
        x, stack.words, *given.tensors, bias_NO, out, experts_TA, weights_TA,
        first_expert, count, n, stack.k, words_per_row, *given.sizes, x.stride(0), *limits,
        experts_TA.shape[1], CLAMPED.value if gate and clamp else gate, *given.constants,
        tiling.block_n, tiling.block_w, stack.k % (codes * tiling.block_w) == 0,
        overlaps_launches(x.device), uses_assembly(stack.kind, x.device),
        **launch_options(x.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out
