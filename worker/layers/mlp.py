"""Gated feed-forward network: gate and up are column parallel, down is row parallel."""

# T tokens, D model dim, F feed-forward dim of this rank

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.quantization import DENSE, WeightFormat
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.linear import ColumnParallelLinear, RowParallelLinear, RowSlice, even_range
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.quantization.float8_rows import Activations, plain, values_and_scale
from mgpu.worker.ranks.collectives import TensorParallelGroup


class GatedMLP(Module):
    """``down(act(gate(x)) * up(x))``, summed over the ranks."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Literal["silu", "gelu_tanh"],
        bias: bool,
        group: TensorParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
        form: WeightFormat = DENSE,
    ) -> None:
        mine = even_range(intermediate_size, group.rank, group.size)
        self.activation = activation
        self._uses_kernel = uses_kernels(device)
        self.width = len(mine)
        slices = (RowSlice("gate_proj", mine), RowSlice("up_proj", mine))
        self.gate_up = ColumnParallelLinear(hidden_size, slices, bias, dtype, device, form)
        self.down = RowParallelLinear(mine, hidden_size, bias, group, dtype, device, form)

    def __call__(self, x_TD: Activations) -> Delta:
        if self._uses_kernel:
            return self.down.partial(self._gated_by_kernels(x_TD))
        return self.down.partial(self._gated(plain(self.gate_up(x_TD))))

    def _gated_by_kernels(self, x_TD: Activations) -> Activations:
        from mgpu.worker.kernels.layers.activation import gated_activation, gated_activation_float8
        from mgpu.worker.kernels.products.choose import one_row_matmul

        if isinstance(x_TD, Tensor) and len(x_TD) == 1:
            return one_row_matmul(x_TD, self.gate_up.held, self.gate_up.bias, self.activation)
        gate_up_TF2, scale_T = values_and_scale(self.gate_up(x_TD))
        if self.down.takes_float8(len(gate_up_TF2)):
            return gated_activation_float8(gate_up_TF2, self.activation, scale_T)
        return gated_activation(gate_up_TF2, self.activation, scale_T)

    def _gated(self, gate_up_TF2: Tensor) -> Tensor:
        """Give act(gate) * up, [T, F]."""
        gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
        hidden_TF = F.silu(gate_TF) if self.activation == "silu" else F.gelu(gate_TF, approximate="tanh")
        return hidden_TF.mul_(up_TF)

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.gate_up.load(reader, prefix)
        self.down.load(reader, f"{prefix}.down_proj")
