"""Multiply by a quantized weight in plain torch: the CPU's way, and that of a GPU without kernels."""

# T tokens, I inputs, O outputs

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.quantization.packing import PackedWeight, dequantize

BLOCK_ELEMENTS = 1 << 18
"""Weights that are dequantized at once: few enough to stay in a core's cache until they are multiplied."""


def quantized_matmul(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """Return ``x @ w.T + bias`` with the weight dequantized to the activations' type, a block of outputs at a time."""
    outputs = len(weight.words)
    rows = max(1, BLOCK_ELEMENTS // weight.k)
    y_TO = torch.empty((len(x_TI), outputs), dtype=x_TI.dtype, device=x_TI.device)
    for first in range(0, outputs, rows):
        end = min(outputs, first + rows)
        block = replace(weight, words=weight.words[first:end], scales=weight.scales[first:end])
        bias = None if bias_O is None else bias_O[first:end]
        y_TO[:, first:end] = F.linear(x_TI, dequantize(block, x_TI.dtype), bias)
    return y_TO
