"""Gated feed-forward network: gate and up are column parallel, down is row parallel."""

# T tokens, D model dim, F feed-forward dim of this rank

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgpu.worker.collectives import TensorParallelGroup
from mgpu.worker.layers.linear import ColumnParallelLinear, RowParallelLinear, RowSlice, even_range
from mgpu.worker.loaders.reader import WeightReader


class GatedMLP(nn.Module):
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
    ) -> None:
        super().__init__()
        mine = even_range(intermediate_size, group.rank, group.size)
        self.is_silu = activation == "silu"
        self.width = len(mine)
        slices = (RowSlice("gate_proj", mine), RowSlice("up_proj", mine))
        self.gate_up = ColumnParallelLinear(hidden_size, slices, bias, dtype, device)
        self.down = RowParallelLinear(mine, hidden_size, bias, group, dtype, device)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TD).split(self.width, dim=-1)
        hidden_TF = F.silu(gate_TF) if self.is_silu else F.gelu(gate_TF, approximate="tanh")
        out_TD: Tensor = self.down(hidden_TF.mul_(up_TF))
        return out_TD

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.gate_up.load(reader, prefix)
        self.down.load(reader, f"{prefix}.down_proj")
