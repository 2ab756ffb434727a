"""Linear layers whose weight is split over the ranks of a stage.

Column parallel: each rank holds some rows of the weight, so some of the outputs; the input is whole on every rank.
Row parallel: each rank holds the columns that match its inputs; the ranks' partial outputs are summed.
A column-parallel layer followed by a row-parallel one needs a single all-reduce.
"""

# T tokens, I inputs of this rank, O outputs of this rank

from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.placement import HeadShard
from mgpu.worker.collectives import TensorParallelGroup
from mgpu.worker.layers.cpu_matmul import pack
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.product import matmul
from mgpu.worker.loaders.reader import WeightReader


def even_range(total: int, rank: int, size: int) -> range:
    """Give one rank's share of ``total`` items: equal shares where it divides, else they differ by at most one."""
    return range(total * rank // size, total * (rank + 1) // size)


class Linear(Module):
    """Hold one rank's weight [O, I] and optional bias [O]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty((outputs, inputs), dtype=dtype, device=device)
        self.bias = torch.empty(outputs, dtype=dtype, device=device) if bias else None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return matmul(x_TI, self.weight, self.bias)

    def init_dummy(self, generator: torch.Generator) -> None:
        """Draw a weight that keeps the scale of its input."""
        self.weight.normal_(0.0, self.weight.shape[1] ** -0.5, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def finalize(self) -> None:
        """Repack the loaded weight for the device; called once, after loading."""
        self.weight = pack(self.weight)

    def weight_bytes(self) -> int:
        """Give the memory of weight and bias."""
        held = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        return held * self.weight.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Rows ``rows`` of the checkpoint tensor called ``name`` (within the module's own prefix)."""

    name: str
    rows: range


class ColumnParallelLinear(Linear):
    """Compute this rank's outputs of several matrices over the same input, stacked in one weight."""

    def __init__(
        self, inputs: int, slices: tuple[RowSlice, ...], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(inputs, sum(len(part.rows) for part in slices), bias, dtype, device)
        self.slices = slices

    def load(self, reader: WeightReader, prefix: str) -> None:
        """Read this rank's rows of each of the matrices."""
        first = 0
        for part in self.slices:
            end = first + len(part.rows)
            reader.fill_rows(self.weight[first:end], f"{prefix}.{part.name}.weight", part.rows.start)
            if self.bias is not None:
                reader.fill_rows(self.bias[first:end], f"{prefix}.{part.name}.bias", part.rows.start)
            first = end


def qkv_slices(heads: HeadShard, head_dim: int) -> tuple[RowSlice, ...]:
    """Rows of q, k and v for one rank's heads; ranks that replicate a KV head read the same rows of k and v."""
    q_rows = range(heads.q_start * head_dim, heads.q_stop * head_dim)
    kv_rows = range(heads.kv_start * head_dim, heads.kv_stop * head_dim)
    return RowSlice("q_proj", q_rows), RowSlice("k_proj", kv_rows), RowSlice("v_proj", kv_rows)


class RowParallelLinear(Linear):
    """Multiply this rank's inputs by its columns and sum over the ranks; the bias is added once, after the sum."""

    def __init__(
        self,
        columns: range,
        outputs: int,
        bias: bool,
        group: TensorParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(len(columns), outputs, bias, dtype, device)
        self.columns = columns
        self.group = group

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self.group.size == 1:
            return matmul(x_TI, self.weight, self.bias)
        y_TO = self.group.all_reduce(matmul(x_TI, self.weight))
        return y_TO if self.bias is None else y_TO.add_(self.bias)

    def load(self, reader: WeightReader, name: str) -> None:
        """Read this rank's columns."""
        reader.fill_columns(self.weight, f"{name}.weight", self.columns.start)
        if self.bias is not None:
            reader.fill_rows(self.bias, f"{name}.bias")
