"""Make random weights in the format of a quantized checkpoint: to compile kernels for, and to measure with."""

# N outputs, K inputs, G groups

import torch
from torch import Tensor

from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.quantization.packing import HIGH_BITS, KIND_OF, SUPER_BLOCK, PackedWeight, nibble_words, octet_words

_SIZES = {
    "int8": 74.0, "fp8": 100.0, "int6": 18.0, "int5": 9.2, "int4": 4.6, "fp4": 3.0, "nl4": 70.0, "int3": 2.3,
    "int2": 1.1,
}  # fmt: skip
"""The standard deviation of the random q of a kind, about."""


def random_packed(form: WeightFormat, parts: tuple[int, ...], inputs: int, generator: torch.Generator) -> PackedWeight:
    """Return a stack of matrices of so many rows each that keeps the scale of its input."""
    if form.block:
        return _random_blocks(form, sum(parts), inputs, generator)
    device, outputs, kind = generator.device, sum(parts), KIND_OF[form.quant]
    is_octet = kind in ("int8", "fp8")
    most = 120 if kind == "fp8" else 256 if is_octet else 16  # the last codes of e4m3 are large, or NaN
    codes_NK = torch.randint(most, (outputs, inputs), generator=generator, device=device, dtype=torch.int32)
    words = octet_words(codes_NK) if is_octet else nibble_words(codes_NK)
    sharing, groups = form.rows_sharing(parts), form.groups(inputs)
    dtype = {4: torch.float32, 2: torch.bfloat16, 1: torch.uint8}[form.scale_bytes]
    scale = 118 if dtype == torch.uint8 else inputs**-0.5 / _SIZES[kind]
    scales_RG = torch.full((outputs // sharing, groups), scale, dtype=dtype, device=device)
    zeros_NG = order = None
    if form.zero_bytes:
        of_zeros = torch.int8 if form.zero_bytes == 1 else torch.int16
        zeros_NG = torch.zeros((outputs, groups), dtype=of_zeros, device=device)
    if form.is_ordered:
        shuffled = torch.randperm(inputs, generator=generator, device=device) % groups
        order = shuffled.to(torch.int32).repeat(len(parts), 1)
    ends = tuple(sum(parts[: index + 1]) for index in range(len(parts))) if form.is_ordered else ()
    return PackedWeight(kind, words, scales_RG, inputs, form.group, sharing, zeros_NG, order, ends)


def _random_blocks(form: WeightFormat, outputs: int, inputs: int, generator: torch.Generator) -> PackedWeight:
    """Return a random matrix in a format of GGUF."""
    device, kind, groups = generator.device, KIND_OF[form.quant], form.groups(inputs)

    def integers(columns: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, (outputs, columns), generator=generator, device=device, dtype=dtype)

    def halves(columns: int, size: float) -> Tensor:
        return torch.rand(outputs, columns, generator=generator, device=device).mul_(size).to(torch.float16)

    size = inputs**-0.5 / _SIZES[kind]
    words_per_row = -(-inputs // form.padding) * form.padding // (4 if kind == "int8" else 8)
    of_words = torch.int16 if kind in ("int3", "int2") else torch.int32
    words = integers(words_per_row, torch.iinfo(of_words).min, torch.iinfo(of_words).max, of_words)
    high = offsets = supers = None
    if bits := HIGH_BITS.get(kind):
        high = integers(words_per_row, 0, 1 << (bits * 7), torch.int16 if bits == 2 else torch.uint8)
    if form.super_bytes:
        is_signed = kind in ("int6", "int3", "nl4")
        scales = integers(
            groups, -32 if is_signed else 0, 32 if is_signed else 64, torch.int8 if is_signed else torch.uint8
        )
        offsets = integers(groups, 0, 64, torch.uint8) if form.offset_bytes else None
        supers = halves(-(-inputs // SUPER_BLOCK) * form.super_bytes // 2, size / 32).view(
            outputs, -1, form.super_bytes // 2
        )
    else:
        scales = halves(groups, size) if form.scale_bytes == 2 else integers(groups, 110, 120, torch.uint8)
        offsets = halves(groups, 8 * size) if form.offset_bytes else None
    return PackedWeight(kind, words, scales, inputs, form.group, high=high, offsets=offsets, supers=supers)
