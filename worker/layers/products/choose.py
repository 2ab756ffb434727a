"""Choose the product of a linear layer for its device. Layers ask when they are built.

Modules of kernels are imported here and not above, since they import triton, which machines without a GPU may lack.
"""

# T tokens, I inputs, O outputs

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.products import cpu_matmul
from mgpu.worker.layers.products.cpu_packed import Held, repack
from mgpu.worker.quantization.float8_rows import Float8Rows, UnscaledProduct
from mgpu.worker.quantization.packing import PackedWeight, dequantize

DenseProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [T, I], weight [O, I], bias [O]) -> ``x @ weight.T + bias``."""
PackedProduct = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
"""The same for a quantized weight."""

BLOCK_ELEMENTS = 1 << 18
"""Weights that are dequantized at once: few enough to stay in a core's cache until they are multiplied."""


def dense_product(device: torch.device) -> DenseProduct:
    """Return the product with dense weights. A weight on the CPU may be one that `cpu_matmul.pack` returned."""
    if device.type == "cpu":
        return cpu_matmul.matmul
    if uses_kernels(device):
        from mgpu.worker.kernels.products import choose

        return choose.matmul
    return F.linear


def packed_product(device: torch.device, form: WeightFormat) -> PackedProduct:
    """Return the product with quantized weights. What a form is tried for is tried now, before graphs are captured."""
    if uses_kernels(device):
        from mgpu.worker.kernels.products import choose

        choose.try_products(device, form)
        return choose.quantized_matmul
    return quantized_matmul


def packed_rows(device: torch.device) -> Callable[[PackedWeight, torch.dtype], Tensor]:
    """Return the function that widens a few rows of a packed weight."""
    if uses_kernels(device):
        from mgpu.worker.kernels.products.dequantize import dequantize_packed

        return dequantize_packed
    return dequantize


def packed_head_product(device: torch.device, form: WeightFormat) -> PackedProduct:
    """Return the product with a packed head, which is never widened as a whole: it may be the largest matrix."""
    multiply = packed_product(device, form)
    if not uses_kernels(device):
        return multiply
    from mgpu.worker.kernels.products.choose import most_rows_at_once

    def product(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
        step = most_rows_at_once(weight, x_TI.dtype)
        if len(x_TI) <= step:
            return multiply(x_TI, weight, bias_O)
        parts = [x_TI[first : first + step] for first in range(0, len(x_TI), step)]
        return torch.cat([multiply(part, weight, bias_O) for part in parts])

    return product


def quantized_matmul(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """Return ``x @ w.T + bias`` with the weight dequantized to the activations' type, a block of outputs at a time."""
    outputs = len(weight.words)
    step = -(-max(1, BLOCK_ELEMENTS // weight.k) // weight.rows) * weight.rows
    y_TO = torch.empty((len(x_TI), outputs), dtype=x_TI.dtype, device=x_TI.device)
    for first in range(0, outputs, step):
        end = min(outputs, first + step)
        bias = None if bias_O is None else bias_O[first:end]
        y_TO[:, first:end] = F.linear(x_TI, dequantize(weight.outputs(first, end), x_TI.dtype), bias)
    return y_TO


def embed_kernel(device: torch.device) -> Callable[[Tensor, Tensor, int, int], Tensor] | None:
    """Return the kernel that looks tokens up in a slice of an embedding; None: torch does that in several steps."""
    if not uses_kernels(device):
        return None
    from mgpu.worker.kernels.layers.embed import embed_rows

    return embed_rows


def multiplies_float8(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of many rows with fp8 weights are float8 products there (W8A8)."""
    if dtype != torch.bfloat16 or not uses_kernels(device):
        return False
    from mgpu.worker.kernels.products import float8_product

    return float8_product.multiplies_float8(device)


def matmul_float8(x_TI: Tensor | Float8Rows, weight: PackedWeight) -> UnscaledProduct:
    """Return ``x @ w.T`` in float8; quantize x if it is not yet."""
    from mgpu.worker.kernels.layers.float8_quantize import quantize_rows
    from mgpu.worker.kernels.products.float8_product import float8_product
    from mgpu.worker.kernels.products.rounded_product import rounded_product

    rows = x_TI if isinstance(x_TI, Float8Rows) else quantize_rows(x_TI)
    return float8_product(rows, weight) if weight.power is None else rounded_product(rows, weight)


def held_weight(weight: PackedWeight, form: WeightFormat, dtype: torch.dtype) -> Held:
    """Return a loaded weight as products of its device take it. Must not be called within the capture of a graph."""
    if not uses_kernels(weight.words.device):
        return repack(weight, dtype)
    from mgpu.worker.kernels.products.rounded_trial import with_power

    return with_power(weight, form, dtype)


def least_rounded_rows() -> int:
    """Return from how many rows on weights with a ``power`` are multiplied in float8."""
    from mgpu.worker.kernels.products.rounded_product import LEAST_ROWS

    return LEAST_ROWS
