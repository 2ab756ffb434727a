"""Multiply by a weight on whatever device it is."""

# T tokens, I inputs, O outputs

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers import cpu_matmul
from mgpu.worker.quantization import matmul as quantized_matmul
from mgpu.worker.quantization.float8_rows import Float8Rows, ScaledRows
from mgpu.worker.quantization.packing import PackedWeight


def matmul(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Give ``x @ weight.T + bias``. A weight on the CPU may be one that `cpu_matmul.pack` returned."""
    if weight_OI.device.type == "cpu":
        return cpu_matmul.matmul(x_TI, weight_OI, bias_O)
    if uses_kernels(weight_OI.device):
        from mgpu.worker.kernels.products import choose  # imports triton, which machines without a GPU may lack

        return choose.matmul(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


def multiplies_float8(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether products of many rows with fp8 weights are float8 ones there (W8A8)."""
    if dtype != torch.bfloat16 or not uses_kernels(device):
        return False
    from mgpu.worker.kernels.products import float8_product

    return float8_product.multiplies_float8(device)


def matmul_float8(x_TI: Tensor | Float8Rows, weight: PackedWeight) -> ScaledRows:
    """Give ``x @ w.T`` where `multiplies_float8`, quantizing x if it is not yet."""
    from mgpu.worker.kernels.layers.float8_quantize import quantize_rows
    from mgpu.worker.kernels.products.float8_product import float8_product

    return float8_product(x_TI if isinstance(x_TI, Float8Rows) else quantize_rows(x_TI), weight)


def matmul_packed(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """Give ``x @ w.T + bias`` for a quantized weight."""
    if uses_kernels(weight.words.device):
        from mgpu.worker.kernels.products import choose as products

        return products.quantized_matmul(x_TI, weight, bias_O)
    return quantized_matmul.quantized_matmul(x_TI, weight, bias_O)
