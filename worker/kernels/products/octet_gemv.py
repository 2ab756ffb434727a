# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Matrix-vector products of a single decode row with 8-bit words whose groups have scales.

Two forms are here, and their scales are what `quantized_gemv` does not have:

- Float8 with a scale for 128 x 128 weights: all rows of a program share it (a gated program has two), so a thread loads
  one number for all of its rows and four words.
- int8 with a float16 scale for 32 weights (GGUF's Q8_0): the four parts of a word are in four groups, whose scales are
  neighbours. A thread loads them as one number of 64 bits.
"""

# N output channels, K input channels

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.products.gemv import GATES, store_outputs, weight_rows
from mgpu.worker.kernels.products.widen import KINDS, split_halves, widen_to_floats
from mgpu.worker.kernels.runtime import (
    ceil_div,
    launch_options,
    overlaps_launches,
    uses_assembly,
    wait_for_inputs,
)
from mgpu.worker.quantization.float8_rows import BLOCK
from mgpu.worker.quantization.packing import WORDS, PackedWeight

_RUN = 32
"""Weights that share a scale of Q8_0."""


@dataclass(frozen=True, slots=True)
class OctetGemvTiling:
    """How a product is cut."""

    block_n: int
    """Rows of the weight per program; even where it is gated, and a part of a block of 128."""
    block_w: int
    """Words per step."""
    num_warps: int
    ahead: bool = False
    """Whether the words of the next step are loaded before a step is multiplied."""


@triton.jit
def _load_step(
    w_ptr, scale_ptr, rows, first, words_per_row, blocks, none, N,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr, IN_RUNS: tl.constexpr,
):  # fmt: skip
    """Load the words of a step, and their scales as they are stored, [rows or 1 or 2, runs of four words]."""
    column = first + tl.arange(0, BLOCK_W)
    places = rows[:, None] * words_per_row + column[None, :]
    if EVEN:
        words = tl.load(w_ptr + places)
    else:
        words = tl.load(w_ptr + places, mask=(column < words_per_row)[None, :], other=0)
    # ``none`` is 0, which the compiler does not know: so each thread loads what belongs to its own words.
    block = tl.minimum((first // 4 + tl.arange(0, BLOCK_W // 4)) // 8, blocks - 1)
    block = tl.max_contiguous(block, [8]) + none
    if IN_RUNS:
        scale = tl.load(scale_ptr + rows[:, None] * blocks + block[None, :])
    elif GATE == 0:
        row = tl.program_id(0) * BLOCK_N
        scale = tl.load(scale_ptr + row // 128 * blocks + block)[None, :]
    else:  # rows of gate and up in turn
        row = tl.program_id(0) * (BLOCK_N // 2)
        of_gate = tl.load(scale_ptr + row // 128 * blocks + block)[None, :]
        of_up = tl.load(scale_ptr + (row + N) // 128 * blocks + block)[None, :]
        scale = tl.where((tl.arange(0, BLOCK_N) % 2 == 0)[:, None], of_gate, of_up)
    return words, scale


@triton.jit
def _run_sums(products, ROWS: tl.constexpr, RUNS: tl.constexpr):
    return tl.sum(tl.reshape(products, [ROWS, RUNS, 4]), 2)


@triton.jit
def _load_inputs(x_ptr, c, K, PART: tl.constexpr, EVEN_K: tl.constexpr):
    k = (c // 32 * 4 + PART) * 32 + c % 32
    if EVEN_K:  # noqa: SIM108 - compile-time condition
        x = tl.load(x_ptr + k).to(tl.float32)
    else:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return x[None, :]


@triton.jit
def _step_sums(
    words, scale, x_ptr, c, K,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, EVEN_K: tl.constexpr,
    IN_RUNS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return the sums of a step's products, [rows, runs]."""
    parts = widen_to_floats(words, KIND, ASSEMBLY)
    x0, x1 = _load_inputs(x_ptr, c, K, 0, EVEN_K), _load_inputs(x_ptr, c, K, 1, EVEN_K)
    x2, x3 = _load_inputs(x_ptr, c, K, 2, EVEN_K), _load_inputs(x_ptr, c, K, 3, EVEN_K)
    if IN_RUNS:
        scale0, scale1 = split_halves(scale.to(tl.int32))
        scale2, scale3 = split_halves((scale >> 32).to(tl.int32))
        sums = _run_sums(parts[0] * x0, BLOCK_N, RUNS) * scale0 + _run_sums(parts[1] * x1, BLOCK_N, RUNS) * scale1
        sums += _run_sums(parts[2] * x2, BLOCK_N, RUNS) * scale2 + _run_sums(parts[3] * x3, BLOCK_N, RUNS) * scale3
    else:
        sums = _run_sums(parts[0] * x0 + parts[1] * x1 + parts[2] * x2 + parts[3] * x3, BLOCK_N, RUNS)
        sums *= scale.to(tl.float32)
    return sums


@triton.jit(do_not_specialize=["none"])
def _octet_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, N, K, words_per_row, blocks, none,
    KIND: tl.constexpr, IN_RUNS: tl.constexpr, AHEAD: tl.constexpr,
    GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N outputs. EVEN: the words of a row fill whole steps; EVEN_K: and K fills the words."""
    RUNS: tl.constexpr = BLOCK_W // 4
    rows = weight_rows(N, GATE, BLOCK_N)
    column = tl.arange(0, BLOCK_W)
    words, scale = _load_step(
        w_ptr, scale_ptr, rows, 0, words_per_row, blocks, none, N, GATE, BLOCK_N, BLOCK_W, EVEN, IN_RUNS
    )
    wait_for_inputs(OVERLAP)
    acc = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for first in range(0, words_per_row, BLOCK_W):
        if AHEAD:  # past the last step the words of the first are loaded again, which nothing uses
            following = tl.where(first + BLOCK_W < words_per_row, first + BLOCK_W, 0)
            next_words, next_scale = _load_step(
                w_ptr, scale_ptr, rows, following, words_per_row, blocks, none, N,
                GATE, BLOCK_N, BLOCK_W, EVEN, IN_RUNS,
            )  # fmt: skip
        elif first > 0:
            words, scale = _load_step(
                w_ptr, scale_ptr, rows, first, words_per_row, blocks, none, N, GATE, BLOCK_N, BLOCK_W, EVEN, IN_RUNS
            )
        acc += _step_sums(words, scale, x_ptr, first + column, K, KIND, BLOCK_N, RUNS, EVEN_K, IN_RUNS, ASSEMBLY)
        if AHEAD:
            words, scale = next_words, next_scale
    store_outputs(tl.sum(acc, 1), rows, bias_ptr, y_ptr, N, GATE, BLOCK_N)


def takes_octets(weight: PackedWeight) -> bool:
    """Return True for float8 in whole blocks of 128 x 128, and for int8 in groups of 32 of whole words."""
    if weight.kind not in ("int8", "fp8") or weight.zeros is not None or weight.order is not None:
        return False
    if weight.kind == "fp8":
        # Gate and up, stacked, have whole blocks each.
        return (weight.group, weight.rows) == (BLOCK, BLOCK) and len(weight.words) % (2 * BLOCK) == 0
    is_in_runs = (weight.group, weight.rows, weight.scales.dtype) == (_RUN, 1, torch.float16)
    return is_in_runs and weight.k % (4 * _RUN) == 0


def choose_tiling(weight: PackedWeight) -> OctetGemvTiling:
    """Pick tiles, as measured on an H200 (docs/kernels.md)."""
    outputs, k, is_float8 = len(weight.words), weight.k, weight.kind == "fp8"
    if outputs <= k:
        return OctetGemvTiling(4 if is_float8 else 8, 512, 4)
    if is_float8 or outputs > 4 * k:
        return OctetGemvTiling(4, 256, 2)
    return OctetGemvTiling(4, 512, 4, ahead=True)


def octet_gemv(
    x_1K: Tensor,
    weight: PackedWeight,
    *,
    gate: Activation | None = None,
    bias_N: Tensor | None = None,
    tiling: OctetGemvTiling | None = None,
) -> Tensor:
    """Multiply one row by the dequantized weight's transpose in float32; ``gate`` as in `gemv`."""
    k = x_1K.shape[-1]
    outputs, words_per_row = weight.words.shape
    if x_1K.shape[0] != 1 or k != weight.k:
        raise ValueError(f"octet_gemv takes 1 row of {weight.k} channels, got {x_1K.shape[0]} of {k}")
    n = outputs // (2 if gate else 1)
    tiling = tiling or choose_tiling(weight)
    out_1N = torch.empty(1, n, dtype=x_1K.dtype, device=x_1K.device)
    is_in_runs = weight.kind == "int8"
    scales = weight.scales.view(torch.int64) if is_in_runs else weight.scales
    block_w = max(tiling.block_w, WORDS)
    even = words_per_row % block_w == 0
    _octet_gemv_kernel[(ceil_div(outputs, tiling.block_n),)](
        x_1K, weight.words, scales, bias_N, out_1N, n, k, words_per_row, scales.shape[1], 0,
        KINDS[weight.kind], is_in_runs, tiling.ahead,
        GATES[gate], tiling.block_n, block_w, even, even and k == 4 * words_per_row,
        overlaps_launches(x_1K.device), uses_assembly(weight.kind, x_1K.device),
        **launch_options(x_1K.device, tiling.num_warps, 1),
    )  # fmt: skip
    return out_1N
