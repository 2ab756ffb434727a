# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix-vector products of a single decode row with packed weights whose groups have scales of their own."""

# N output channels, K input channels

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.products.gemv import GATES, store_outputs, weight_rows
from mgpu.worker.kernels.products.group_parts import RUN_KINDS, group_arguments
from mgpu.worker.kernels.products.group_rows import load_row_words, multiply_words
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, uses_assembly, wait_for_inputs
from mgpu.worker.quantization.packing import PackedWeight


@dataclass(frozen=True, slots=True)
class GroupGemvTiling:
    """How a product is cut."""

    block_n: int
    """Rows of the weight per program; even where it is gated."""
    block_w: int
    """Words per step."""
    num_warps: int


@triton.jit
def _group_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, bias_ptr, y_ptr,
    N, K, words_per_row, groups, supers,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N outputs; EVEN as in `multiply_words`."""
    rows = weight_rows(N, GATE, BLOCK_N)
    words, high = load_row_words(w_ptr, high_ptr, rows, tl.arange(0, BLOCK_W), words_per_row, K, KIND, EVEN)
    wait_for_inputs(OVERLAP)
    y = multiply_words(
        words, high, x_ptr, w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, rows,
        K, words_per_row, groups, supers, KIND, GROUP, SHARED, BLOCK_N, BLOCK_W, EVEN, ASSEMBLY,
    )  # fmt: skip
    store_outputs(y, rows, bias_ptr, y_ptr, N, GATE, BLOCK_N)


def choose_tiling(weight: PackedWeight, gated: bool) -> GroupGemvTiling:
    """Pick tiles, as measured on an H200 for groups of 32 and 128 (docs/kernels.md)."""
    if gated or len(weight.words) > weight.k:
        return GroupGemvTiling(8 if weight.kind == "int4" else 4, 256, 2)
    return GroupGemvTiling(4, 512, 4)


def group_gemv(
    x_1K: Tensor,
    weight: PackedWeight,
    *,
    gate: Activation | None = None,
    bias_N: Tensor | None = None,
    tiling: GroupGemvTiling | None = None,
) -> Tensor:
    """Multiply one row by the dequantized weight's transpose in float32; ``gate`` as in `gemv`."""
    k = x_1K.shape[-1]
    outputs, words_per_row = weight.words.shape
    if x_1K.shape[0] != 1 or k != weight.k:
        raise ValueError(f"group_gemv takes 1 row of {weight.k} channels, got {x_1K.shape[0]} of {k}")
    n = outputs // (2 if gate else 1)
    tiling = tiling or choose_tiling(weight, gate is not None)
    out_1N = torch.empty(1, n, dtype=x_1K.dtype, device=x_1K.device)
    given = group_arguments(weight)
    codes = 8 if weight.kind in RUN_KINDS else 4
    _group_gemv_kernel[(ceil_div(outputs, tiling.block_n),)](
        x_1K, weight.words, *given.tensors, bias_N, out_1N, n, k, words_per_row, *given.sizes,
        *given.constants,
        GATES[gate], tiling.block_n, tiling.block_w, k % (codes * tiling.block_w) == 0,
        overlaps_launches(x_1K.device), uses_assembly(weight.kind, x_1K.device),
        **launch_options(x_1K.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_1N
