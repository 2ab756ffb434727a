# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Unpack words of eight codes on the device, whose groups have scales of their own: GPTQ, AWQ, MXFP4, GGUF."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.products.group_parts import group_arguments, load_words, words_to_weights
from mgpu.worker.kernels.runtime import ceil_div, launch_options, overlaps_launches, wait_for_inputs
from mgpu.worker.quantization.float8_rows import BLOCK
from mgpu.worker.quantization.packing import WORDS, PackedWeight

ROWS = 16
"""Outputs per program."""


@triton.jit
def _dequantize_groups_kernel(
    w_ptr, scale_ptr, zero_ptr, offset_ptr, super_ptr, high_ptr, table_ptr, power_ptr, out_ptr,
    N, K, words_per_row, groups, supers,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    word = block * 32 + tl.arange(0, 32)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    wait_for_inputs(OVERLAP)  # also keeps ``out`` alive: an earlier product may still read it
    words, high = load_words(w_ptr, high_ptr, rows, word, words_per_row, EVEN)
    power = 1.0
    if power_ptr is not None:
        power = tl.load(power_ptr)
    weights = words_to_weights(
        words, high, scale_ptr, zero_ptr, offset_ptr, super_ptr, table_ptr, rows, block, groups, supers, power,
        KIND, GROUP, SHARED, ROWS, out_ptr.dtype.element_ty,
    )  # fmt: skip
    if power_ptr is None:
        in_order = tl.permute(tl.reshape(weights, [ROWS, 8, 4, 8]), [0, 1, 3, 2])
    else:  # of a block of 128 channels those at the same place in its four runs are neighbours
        in_order = tl.permute(tl.reshape(weights, [ROWS, 2, 4, 4, 8]), [0, 1, 4, 3, 2])
    k = block * 256 + tl.arange(0, 256)
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + rows[:, None] * K + k[None, :], tl.reshape(in_order, [ROWS, 256]), mask=mask)


def dequantize_groups(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] in ``dtype``; `packing.dequantize` is the reference. Inputs are in order."""
    return _dequantize(weight, dtype, weight.k, None)


def dequantize_float8(weight: PackedWeight) -> Tensor:
    """Return the weight times its ``power`` in float8, [N, K padded to blocks of 128]; channels are as in `Float8Rows`.

    Padded channels are undefined numbers.
    """
    places = ceil_div(weight.k, BLOCK) * BLOCK
    return _dequantize(weight, torch.float8_e4m3fn, places, weight.power)


def _dequantize(weight: PackedWeight, dtype: torch.dtype, inputs: int, power: Tensor | None) -> Tensor:
    n, words_per_row = weight.words.shape
    out_NK = torch.empty(n, inputs, dtype=dtype, device=weight.words.device)
    given = group_arguments(weight)
    _dequantize_groups_kernel[(ceil_div(n, ROWS), ceil_div(words_per_row, WORDS))](
        weight.words, *given.tensors, power, out_NK, n, inputs, words_per_row, *given.sizes,
        *given.constants, ROWS, words_per_row % WORDS == 0,
        overlaps_launches(out_NK.device), **launch_options(out_NK.device, 4),
    )  # fmt: skip
    return out_NK
