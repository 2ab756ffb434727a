"""Multiply by a weight on whatever device it is."""

# T tokens, I inputs, O outputs

import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.kernel_use import uses_kernels
from mgpu.worker.kernels.packing import PackedWeight
from mgpu.worker.layers import cpu_matmul, quantized_matmul


def matmul(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Give ``x @ weight.T + bias``. A weight on the CPU may be one that `cpu_matmul.pack` returned."""
    if weight_OI.device.type == "cpu":
        return cpu_matmul.matmul(x_TI, weight_OI, bias_O)
    if uses_kernels(weight_OI.device):
        from mgpu.worker.kernels import products  # imports triton, which machines without a GPU may lack

        return products.matmul(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


def matmul_packed(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None = None) -> Tensor:
    """Give ``x @ w.T + bias`` for a quantized weight."""
    if uses_kernels(weight.words.device):
        from mgpu.worker.kernels import products

        return products.quantized_matmul(x_TI, weight, bias_O)
    return quantized_matmul.quantized_matmul(x_TI, weight, bias_O)
