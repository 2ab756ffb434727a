# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Words of eight codes whose groups have scales of their own, widened in registers: every kind but int8 and fp8.

A weight is ``code * scale + bias``; the middle of the range, a zero point and an offset are all part of the bias. A
word's codes are in one group, or the first and the last four are, so scale and bias are computed once a word. A code
becomes a float by a shift and an or: 0x43000000 is 128.0 and bit 16 of its neighbours counts ones, so the float is
128 + code, and 128 scales go into the bias as well.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgpu.worker.kernels.products.dequantize_scaled import KINDS, load_scale
from mgpu.worker.kernels.products.widen import split_scales
from mgpu.worker.quantization.packing import NL4, PackedWeight

RUN_KINDS = ("int4", "fp4", "nl4", "int6", "int5", "int3", "int2")
"""Kinds with words of eight codes."""


@dataclass(frozen=True, slots=True)
class GroupArguments:
    """What kernels take of a weight beside its words."""

    tensors: tuple[Tensor | None, ...]
    """Scales, zero points, offsets, scales of scales, upper bits of codes, and values of codes."""
    sizes: tuple[int, int]
    """Groups and blocks of 256 inputs of an output."""
    constants: tuple[int, int, int]
    """KIND, GROUP and SHARED."""


def takes(weight: PackedWeight) -> bool:
    """Return True if kernels for groups take the weight: its inputs are in order, in groups that fit its words."""
    if weight.order is not None:
        return False
    return weight.group == 0 or weight.group % 32 == 0 or (weight.group == 16 and weight.supers is not None)


def group_arguments(weight: PackedWeight) -> GroupArguments:
    table = _values(weight.words.device) if weight.kind == "nl4" else None
    tensors = weight.scales, weight.zeros, weight.offsets, weight.supers, weight.high, table
    supers = 0 if weight.supers is None else weight.supers.shape[1]
    return GroupArguments(tensors, (weight.scales.shape[1], supers), (KINDS[weight.kind], weight.group, weight.rows))


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(NL4, dtype=torch.float32, device=device)


@triton.jit
def of_words(per_run, ROWS: tl.constexpr):
    """Return what each of 32 words has, [ROWS, 32], of numbers of runs of four words, [ROWS, 8]."""
    return tl.reshape(tl.broadcast_to(per_run[:, :, None], [ROWS, 8, 4]), [ROWS, 32])


@triton.jit
def group_factors(
    scale_ptr, zero_ptr, offset_ptr, super_ptr, rows, k, groups, supers,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Return scale and bias, float32 [rows, len(k)], of the groups that the inputs k are in."""
    group = tl.minimum(k // GROUP, groups - 1) if GROUP > 0 else k * 0
    mask = (rows >= 0)[:, None] & (group >= 0)[None, :]
    places = rows[:, None] * groups + group[None, :]
    MIDDLE: tl.constexpr = 136.0 if KIND == 2 else 160.0 if KIND == 5 else 144.0 if KIND == 6 else 132.0
    if scale_ptr.dtype.element_ty == tl.int32:  # words of two bfloat16, as `--quant 4` makes them
        scale, offset = split_scales(tl.load(scale_ptr + places))
        bias = offset - MIDDLE * scale
    elif super_ptr is None:
        scale = load_scale(scale_ptr + (rows // SHARED)[:, None] * groups + group[None, :], mask)
        if offset_ptr is not None:
            bias = tl.load(offset_ptr + places).to(tl.float32) - 128.0 * scale
        elif KIND == 3 or KIND == 4:
            bias = scale * 0.0
        else:
            bias = scale * -MIDDLE
    else:
        PAIR: tl.constexpr = 2 if KIND == 8 or offset_ptr is not None else 1
        super_ptrs = super_ptr + (rows[:, None] * supers + tl.minimum(k // 256, supers - 1)[None, :]) * PAIR
        factor = tl.load(super_ptrs).to(tl.float32)
        stored = tl.load(scale_ptr + places)
        if KIND == 8:
            scale = (stored & 15).to(tl.float32) * factor
            bias = scale * -128.0 - ((stored >> 4) & 15).to(tl.float32) * tl.load(super_ptrs + 1).to(tl.float32)
        else:
            scale = stored.to(tl.float32) * factor
            if offset_ptr is not None:
                bias = scale * -128.0 - tl.load(offset_ptr + places).to(tl.float32) * tl.load(super_ptrs + 1).to(
                    tl.float32
                )
            elif KIND == 4:
                bias = scale * 0.0
            else:
                bias = scale * -MIDDLE
    if zero_ptr is not None:
        bias -= tl.load(zero_ptr + places).to(tl.float32) * scale
    return scale, bias


@triton.jit
def code_floats(words, high, table_ptr, PART: tl.constexpr, KIND: tl.constexpr):
    """Return what a part of each word holds: 128 + code; for KIND 3 (e2m1) and 4 (a table) the value."""
    if KIND == 3:  # e2m1's exponent and mantissa, moved to float32's, are the value times 2^-126
        bits = ((words << (28 - 4 * PART)) & -0x80000000) | (((words >> (4 * PART)) & 0x7) << 22)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    elif KIND == 4:
        value = tl.load(table_ptr + ((words >> (4 * PART)) & 0xF))
    else:
        if KIND >= 7:
            bits = ((words.to(tl.int32) >> (2 * PART)) & 3) << 16
        elif PART < 4:
            bits = (words << (16 - 4 * PART)) & 0x000F0000
        else:
            bits = (words >> (4 * PART - 16)) & 0x000F0000
        if KIND == 5:
            bits = bits | (((high.to(tl.int32) >> (2 * PART)) & 3) << 20)
        elif KIND == 6:
            bits = bits | (((high.to(tl.int32) >> PART) & 1) << 20)
        elif KIND == 7:
            bits = bits | (((high.to(tl.int32) >> PART) & 1) << 18)
        value = (bits | 0x43000000).to(tl.float32, bitcast=True)
    return value


@triton.jit
def load_words(w_ptr, high_ptr, rows, word, words_per_row, EVEN: tl.constexpr):
    """Return words and the upper bits of their codes, [rows, words]; zeros past the end of a row."""
    words, high = load_places(
        w_ptr, high_ptr, rows[:, None] * words_per_row + word[None, :], (word < words_per_row)[None, :], EVEN
    )
    return words, high


@triton.jit
def load_places(w_ptr, high_ptr, places, mask, EVEN: tl.constexpr):
    """Return words and the upper bits of their codes; zeros outside of ``mask``. EVEN: nothing is outside."""
    if EVEN:  # noqa: SIM108 - compile-time condition
        words = tl.load(w_ptr + places)
    else:
        words = tl.load(w_ptr + places, mask=mask, other=0)
    high = words
    if high_ptr is not None:
        if EVEN:  # noqa: SIM108 - compile-time condition
            high = tl.load(high_ptr + places)
        else:
            high = tl.load(high_ptr + places, mask=mask, other=0)
    return words, high


@triton.jit
def _weights(words, high, table_ptr, scale, bias, PART: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    return (code_floats(words, high, table_ptr, PART, KIND) * scale + bias).to(DTYPE)


@triton.jit
def words_to_weights(
    words, high, scale_ptr, zero_ptr, offset_ptr, super_ptr, table_ptr, rows, block, groups, supers, power,
    KIND: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the weights [ROWS, 256] of a block of words: those of a word side by side, from its lowest bits on.

    They are multiplied by ``power``.
    """
    k = block * 256 + tl.arange(0, 8) * 32
    scale, bias = group_factors(
        scale_ptr, zero_ptr, offset_ptr, super_ptr, rows, k, groups, supers, KIND, GROUP, SHARED
    )
    scale, bias = of_words(scale * power, ROWS), of_words(bias * power, ROWS)
    last_scale, last_bias = scale, bias
    if GROUP == 16:
        last_scale, last_bias = group_factors(
            scale_ptr, zero_ptr, offset_ptr, super_ptr, rows, k + 16, groups, supers, KIND, GROUP, SHARED
        )
        last_scale, last_bias = of_words(last_scale * power, ROWS), of_words(last_bias * power, ROWS)
    even = tl.join(
        tl.join(
            _weights(words, high, table_ptr, scale, bias, 0, KIND, DTYPE),
            _weights(words, high, table_ptr, last_scale, last_bias, 4, KIND, DTYPE),
        ),
        tl.join(
            _weights(words, high, table_ptr, scale, bias, 2, KIND, DTYPE),
            _weights(words, high, table_ptr, last_scale, last_bias, 6, KIND, DTYPE),
        ),
    )
    odd = tl.join(
        tl.join(
            _weights(words, high, table_ptr, scale, bias, 1, KIND, DTYPE),
            _weights(words, high, table_ptr, last_scale, last_bias, 5, KIND, DTYPE),
        ),
        tl.join(
            _weights(words, high, table_ptr, scale, bias, 3, KIND, DTYPE),
            _weights(words, high, table_ptr, last_scale, last_bias, 7, KIND, DTYPE),
        ),
    )
    return tl.reshape(tl.join(even, odd), [ROWS, 256])
