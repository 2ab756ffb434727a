"""Packed weights rounded to float8, in plain torch: what products of many rows do with weights of few bits on Hopper.

The weights of a matrix are multiplied by a power of two first, so that the largest is above 224 and at most 448, the
largest number of float8 e4m3. Weights down to 1/28,672 of the largest then have three bits of mantissa.
"""

# N outputs, K inputs

import torch
from torch import Tensor

from mgpu.worker.quantization.float8_rows import LARGEST, SMALLEST
from mgpu.worker.quantization.packing import PackedWeight, dequantize

ELEMENTS = 1 << 24
"""Weights that are dequantized at once to find the largest one."""


def power_of(weight: PackedWeight) -> Tensor:
    """Return the power of two, float32 [1]."""
    step = max(1, ELEMENTS // weight.k)
    parts = (weight.outputs(first, min(first + step, len(weight.words))) for first in range(0, len(weight.words), step))
    return power_for(torch.stack([dequantize(part, torch.float32).abs().amax() for part in parts]))


def power_for(weights: Tensor) -> Tensor:
    """Return the power of two for dense weights, float32 [1]."""
    most = weights.abs().amax().float().clamp(min=SMALLEST)
    return torch.exp2(torch.floor(torch.log2(LARGEST / most))).view(1)


def round_dense(weights: Tensor) -> Tensor:
    """Return the weights of a matrix rounded to float8, as float32."""
    power = power_for(weights)
    return (weights.float() * power).to(torch.float8_e4m3fn).float() / power
