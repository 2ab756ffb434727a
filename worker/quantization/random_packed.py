"""Make random weights in the format of a quantized checkpoint: to compile kernels for, and to measure with."""

# N outputs, K inputs, G groups

import torch

from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.quantization.packing import KIND_OF, PackedWeight, nibble_words, octet_words

_SIZES = {"int8": 74.0, "fp8": 100.0, "int4": 4.6, "fp4": 3.0}
"""The standard deviation of the random q of a kind, about."""


def random_packed(form: WeightFormat, parts: tuple[int, ...], inputs: int, generator: torch.Generator) -> PackedWeight:
    """Return a stack of matrices of so many rows each that keeps the scale of its input."""
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
