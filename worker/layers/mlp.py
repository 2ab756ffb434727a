"""Gated feed-forward network: gate and up are column parallel, down is row parallel."""

# T tokens, D model dim, F feed-forward dim of this rank

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.facts import Activation
from mgpu.protocol.model.placement import TensorPart
from mgpu.worker.kernels.cpu import layers as cpu_layers
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.activations import Activations, scaled, values_and_scale
from mgpu.worker.layers.linear import ColumnParallelLinear, RowParallelLinear, RowSlice, Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup


class GatedMLP(Module):
    """``down(act(gate(x)) * up(x))``, summed over the ranks."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation,
        bias: bool,
        group: TensorParallelGroup,
        storage: Storage,
        part: TensorPart | None = None,
    ) -> None:
        part = part or TensorPart(group.rank, group.size)
        down = storage.of_down().form
        mine = part.columns(intermediate_size, down.splits_at, down.block)
        self.activation = activation
        self._activate = _kernel_activation() if uses_kernels(storage.device) else _plain_activation
        self.width = len(mine)
        slices = (RowSlice("gate_proj", mine), RowSlice("up_proj", mine))
        self.gate_up = ColumnParallelLinear(hidden_size, slices, bias, storage.of_gate_up())
        self.down = RowParallelLinear(mine, hidden_size, bias, group, storage.of_down())

    def __call__(self, x_TD: Activations) -> Delta:
        return self.down.partial(self._activate(self, x_TD))

    def part(self, x_TD: Activations) -> Tensor:
        """Return this rank's part of the sum, without the bias of ``down``."""
        return self.down.part(self._activate(self, x_TD))

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.gate_up.load(reader, prefix)
        self.down.load(reader, f"{prefix}.down_proj")


Activate = Callable[[GatedMLP, Activations], Activations]
"""Returns act(gate(x)) * up(x), [T, F]."""


def _plain_activation(mlp: GatedMLP, x_TD: Activations) -> Activations:
    gate_up_TF2 = scaled(mlp.gate_up(x_TD))
    if cpu_layers.takes_rows(gate_up_TF2):
        return cpu_layers.gate(gate_up_TF2, mlp.activation != "silu")
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    hidden_TF = F.silu(gate_TF) if mlp.activation == "silu" else F.gelu(gate_TF, approximate="tanh")
    return hidden_TF.mul_(up_TF)


def _kernel_activation() -> Activate:
    from mgpu.worker.kernels.layers.activation import gated_activation, gated_activation_float8
    from mgpu.worker.kernels.products.choose import one_row_matmul, takes_one_row

    def activate(mlp: GatedMLP, x_TD: Activations) -> Activations:
        held = mlp.gate_up.held
        if isinstance(x_TD, Tensor) and len(x_TD) == 1 and not mlp.gate_up.pieces and takes_one_row(held):
            return one_row_matmul(x_TD, held, mlp.gate_up.bias, mlp.activation)
        gate_up_TF2, scale_T = values_and_scale(mlp.gate_up(x_TD))
        gated = gated_activation_float8 if mlp.down.takes_float8(len(gate_up_TF2)) else gated_activation
        return gated(gate_up_TF2, mlp.activation, scale_T)

    return activate
