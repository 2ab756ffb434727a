# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix-vector products of a single decode row with packed weights: `gemv` for `packing`'s words.

8-bit weights and int4 have a kernel each. For int4, arithmetic and not memory is scarce: at 4.3 TB/s one SM has 4.3
issue slots per weight of five bits. A weight costs 1.4 to widen and one to multiply; a scale and an offset are applied
once per run of 32 channels, which one thread holds.
"""

# N output channels, K input channels

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.products.gemv import GATES, store_outputs, weight_rows
from mgpu.worker.kernels.products.widen import INT4_BIAS, KINDS, split_scales, widen_to_floats
from mgpu.worker.kernels.runtime import (
    ceil_div,
    launch_options,
    overlaps_launches,
    uses_assembly,
    wait_for_inputs,
)
from mgpu.worker.quantization.packing import WORDS, PackedWeight


@dataclass(frozen=True, slots=True)
class QuantizedGemvTiling:
    """How a product is cut: see `choose_tiling`."""

    block_n: int
    """Rows of the weight per program; even where it is gated."""
    block_w: int
    """Words per step."""
    num_warps: int
    ahead: bool = False
    """Load the next step's words before multiplying this one's; 8-bit weights only."""


@triton.jit
def _quantized_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, N, K, words_per_row,
    KIND: tl.constexpr, AHEAD: tl.constexpr,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    rows = weight_rows(N, GATE, BLOCK_N)
    column = tl.arange(0, BLOCK_W)
    w_ptrs = w_ptr + rows[:, None] * words_per_row + column[None, :]
    words = tl.load(w_ptrs, mask=(column < words_per_row)[None, :], other=0)
    wait_for_inputs(OVERLAP)

    acc = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for first in range(0, words_per_row, BLOCK_W):
        c = first + column
        if AHEAD:
            next_words = tl.load(w_ptrs + first + BLOCK_W, mask=(c + BLOCK_W < words_per_row)[None, :], other=0)
        elif first > 0:
            words = tl.load(w_ptrs + first, mask=(c < words_per_row)[None, :], other=0)
        parts = widen_to_floats(words, KIND, ASSEMBLY)
        for part in tl.static_range(4):
            k = (c // 32 * 4 + part) * 32 + c % 32
            if EVEN_K:
                x = tl.load(x_ptr + k).to(tl.float32)
            else:
                x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            acc += parts[part] * x[None, :]
        if AHEAD:
            words = next_words

    y = tl.sum(acc, 1) * tl.load(scale_ptr + rows)
    store_outputs(y, rows, bias_ptr, y_ptr, N, GATE, BLOCK_N)


@triton.jit
def _load_words(w_ptrs, first, column, words_per_row, EVEN: tl.constexpr):
    if EVEN:
        words = tl.load(w_ptrs + first)
    else:
        words = tl.load(w_ptrs + first, mask=(first + column < words_per_row)[None, :], other=0)
    return words


@triton.jit
def _int4_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, N, K, words_per_row,
    GROUP: tl.constexpr,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N outputs. EVEN_K: K fills the words of a row, and these whole steps of BLOCK_W."""
    RUNS: tl.constexpr = BLOCK_W // 4
    rows = weight_rows(N, GATE, BLOCK_N)
    column = tl.arange(0, BLOCK_W)
    run = tl.arange(0, RUNS)
    groups = tl.cdiv(K, GROUP)
    w_ptrs = w_ptr + rows[:, None] * words_per_row + column[None, :]
    scale_ptrs = scale_ptr + rows[:, None] * groups
    words = _load_words(w_ptrs, 0, column, words_per_row, EVEN_K)
    pairs = tl.load(scale_ptrs + tl.minimum(run * 32 // GROUP, groups - 1)[None, :])
    wait_for_inputs(OVERLAP)

    acc = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for first in range(0, words_per_row, BLOCK_W):
        if first > 0:
            words = _load_words(w_ptrs, first, column, words_per_row, EVEN_K)
            pairs = tl.load(scale_ptrs + tl.minimum((first // 4 + run) * 32 // GROUP, groups - 1)[None, :])
        parts = widen_to_floats(words, 2, ASSEMBLY)
        word_sums = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        x_sums = tl.zeros([BLOCK_W], tl.float32)
        c = first + column
        for part in tl.static_range(8):
            k = c // 4 * 32 + part * 4 + c % 4
            if EVEN_K:
                x = tl.load(x_ptr + k).to(tl.float32)
            else:
                x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            word_sums += parts[part] * x[None, :]
            x_sums += x
        run_sums = tl.sum(tl.reshape(word_sums, [BLOCK_N, RUNS, 4]), 2)
        run_x = tl.sum(tl.reshape(x_sums, [RUNS, 4]), 1)
        scale, offset = split_scales(pairs)
        acc += scale * run_sums + (offset - INT4_BIAS * scale) * run_x[None, :]

    store_outputs(tl.sum(acc, 1), rows, bias_ptr, y_ptr, N, GATE, BLOCK_N)


def choose_tiling(weight: PackedWeight) -> QuantizedGemvTiling:
    """Pick tiles (see docs/kernels.md): four words per thread and step."""
    n, k = weight.words.shape[0], weight.k
    if weight.kind == "int4":
        return QuantizedGemvTiling(8 if n > k else 4, 256, 2)
    if weight.kind == "fp8":
        return QuantizedGemvTiling(2 if n > 4 * k else 4, 256, 2) if n > k else QuantizedGemvTiling(8, 512, 4)
    return QuantizedGemvTiling(4, 256, 2, n > 4 * k) if n > k else QuantizedGemvTiling(4, 512, 4, True)


def quantized_gemv(
    x_1K: Tensor,
    weight: PackedWeight,
    *,
    gate: Activation | None = None,
    bias_N: Tensor | None = None,
    tiling: QuantizedGemvTiling | None = None,
) -> Tensor:
    """Multiply one row by the dequantized weight's transpose in float32; ``gate`` as in `gemv`."""
    k = x_1K.shape[-1]
    outputs, words_per_row = weight.words.shape
    n = outputs // (2 if gate else 1)
    if x_1K.shape[0] != 1 or k != weight.k:
        raise ValueError(f"quantized_gemv takes 1 row of {weight.k} channels, got {x_1K.shape[0]} of {k}")
    tiling = tiling or choose_tiling(weight)
    out_1N = torch.empty(1, n, dtype=x_1K.dtype, device=x_1K.device)
    is_int4 = weight.kind == "int4"
    even = k == words_per_row * (8 if is_int4 else 4) and words_per_row % tiling.block_w == 0
    kernel = _int4_gemv_kernel if is_int4 else _quantized_gemv_kernel
    form = (weight.group,) if is_int4 else (KINDS[weight.kind], tiling.ahead)
    kernel[(ceil_div(outputs, tiling.block_n),)](
        x_1K, weight.words, weight.scales, bias_N, out_1N, n, k, words_per_row,
        *form,
        GATES[gate], tiling.block_n, max(tiling.block_w, WORDS), even,
        overlaps_launches(x_1K.device), uses_assembly(weight.kind, x_1K.device),
        **launch_options(x_1K.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_1N
