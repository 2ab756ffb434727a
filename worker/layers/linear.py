"""Linear layers whose weight is split over the ranks of a stage.

Column parallel: each rank holds some rows of the weight, so some of the outputs; the input is whole on every rank.
Row parallel: each rank holds the columns that match its inputs; the ranks' partial outputs are summed.
A column-parallel layer followed by a row-parallel one needs a single all-reduce.
"""

# T tokens, I inputs of this rank, O outputs of this rank

import itertools
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgpu.protocol.model.placement import HeadShard
from mgpu.protocol.model.weight_format import DENSE, LayerFormats, WeightFormat
from mgpu.worker.layers.activations import Activations, Product, scaled
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta, sent_product, sum_of_parts, summed_tensor
from mgpu.worker.layers.products.choose import (
    dense_product,
    held_weight,
    least_rounded_rows,
    matmul_float8,
    multiplies_float8,
    packed_product,
)
from mgpu.worker.layers.products.cpu_matmul import matmul_repacked, pack
from mgpu.worker.layers.products.cpu_packed import Held, multiply
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.quantization.float8_rows import LEAST_ROWS, Float8Rows
from mgpu.worker.quantization.packing import PackedWeight
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.random_packed import random_packed
from mgpu.worker.ranks.collectives import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class Storage:
    """How weights are held: in which type and where, and those of linear layers in which format."""

    dtype: torch.dtype
    device: torch.device
    form: WeightFormat = DENSE
    layer: LayerFormats | None = None
    """The formats of the matrices of one layer, if the checkpoint is quantized."""
    parts: tuple[WeightFormat, ...] = ()
    """The formats of stacked matrices if they differ: those of one format are then held by themselves."""

    def of_qkv(self) -> "Storage":
        return self._holding(self.layer.qkv, self.layer.qkv_parts) if self.layer else self

    def of_q_b(self) -> "Storage":
        return self._holding(self.layer.q_b) if self.layer else self

    def of_out(self) -> "Storage":
        return self._holding(self.layer.out) if self.layer else self

    def of_gate_up(self) -> "Storage":
        return self._holding(self.layer.gate_up, self.layer.gate_up_parts) if self.layer else self

    def of_down(self) -> "Storage":
        return self._holding(self.layer.down) if self.layer else self

    def of_shared(self) -> "Storage":
        """Return the storage for the network that all tokens go through beside the experts."""
        if self.layer is None:
            return self
        return replace(self, layer=LayerFormats(gate_up=self.layer.shared_gate_up, down=self.layer.shared_down))

    def whole_blocks(self, columns: range) -> "Storage":
        """Return the storage for some columns of a matrix: dense if they cut blocks, which no plan does."""
        step = self.form.splits_at
        if self.form.source and (columns.start % step or columns.stop % step):
            return replace(self, form=DENSE)
        return self

    def _holding(self, form: WeightFormat, parts: tuple[WeightFormat, ...] = ()) -> "Storage":
        return replace(self, form=parts[0] if parts else form, parts=parts, layer=None)


class Linear(Module):
    """Hold one rank's weight [O, I], dense or quantized, and an optional bias [O].

    A weight to be quantized is dense only while it is loaded, so that a rank never holds two dense ones.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, storage: Storage) -> None:
        dtype, device, form = storage.dtype, storage.device, storage.form
        self._shape = (outputs, inputs)
        self._parts: tuple[int, ...] = (outputs,)
        """Outputs of each matrix, if several are stacked."""
        self._piece_outputs: tuple[int, ...] = ()
        """Outputs of each of ``pieces``."""
        self._form = form
        self.packed: Held | None = None
        self._formats = storage.parts
        self.pieces: tuple[Held, ...] = ()
        """The stacked matrices one by one, if their formats differ."""
        self.weight = torch.empty(self._shape if form.quant == "none" else 0, dtype=dtype, device=device)
        self.bias = torch.empty(outputs, dtype=dtype, device=device) if bias else None
        self._multiply = dense_product(device)
        self._multiply_packed = packed_product(device, form)
        # The library takes multiples of 16 only.
        is_asked = form.quant == "fp8" and not form.source  # of a checkpoint, outputs have scales of their own
        is_float8 = is_asked and outputs % 16 == 0 and multiplies_float8(device, dtype)
        self._float8_rows = LEAST_ROWS if is_float8 else sys.maxsize
        """Rows from which products are in float8."""

    def __call__(self, x_TI: Activations) -> Product:
        return self._product(x_TI, self.bias)

    @property
    def held(self) -> Tensor | PackedWeight:
        """The weight as kernels of GPUs take it, quantized or dense; the first of several formats."""
        held = self.pieces[0] if self.pieces else self.packed
        if held is None:
            return self.weight
        assert isinstance(held, PackedWeight), "kernels of GPUs read no weight that was repacked for the CPU"
        return held

    def takes_float8(self, rows: int) -> bool:
        """Return whether so many rows are multiplied in float8: the layer before may then quantize them."""
        return rows >= self._float8_rows

    def _product(self, x_TI: Activations, bias_O: Tensor | None) -> Product:
        if isinstance(x_TI, Float8Rows) or self.takes_float8(len(x_TI)):
            assert isinstance(self.packed, PackedWeight), "only quantized layers take float8"
            y_TO = matmul_float8(x_TI, self.packed)
            return y_TO if bias_O is None else y_TO.scaled().add_(bias_O)
        if self.packed is not None:
            return self._multiply_held(x_TI, self.packed, bias_O)
        if self.pieces:
            return self._multiply_pieces(x_TI, bias_O)
        return self._multiply(x_TI, self.weight, bias_O)

    def _multiply_pieces(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        count = len(self.pieces)
        biases = [None] * count if bias_O is None else torch.split(bias_O, list(self._piece_outputs))
        pairs = zip(self.pieces, biases, strict=True)
        return torch.cat([self._multiply_held(x_TI, piece, bias) for piece, bias in pairs], dim=1)

    def _multiply_held(self, x_TI: Tensor, weight: Held, bias_O: Tensor | None) -> Tensor:
        if not isinstance(weight, PackedWeight):
            return multiply(x_TI, weight, bias_O)
        return self._multiply_packed(x_TI, weight, bias_O)

    def _dense_weight(self) -> Tensor:
        """Return undefined memory to load into; `_keep` keeps the result."""
        return self.weight if self._form.quant == "none" else self.weight.new_empty(self._shape)

    def _keep(self, weight_OI: Tensor) -> None:
        if self._form.quant != "none":
            self.packed = quantize(weight_OI, self._form)

    def _keep_read(self, weight_OI: Tensor, reader: WeightReader) -> None:
        if self._form.quant != "none":
            reader.wait()
        self._keep(weight_OI)

    def init_dummy(self, generator: torch.Generator) -> None:
        """Draw a weight that keeps the scale of its input."""
        if self._formats:
            pairs = zip(self._formats, self._piece_outputs, strict=True)
            self.pieces = tuple(random_packed(form, (part,), self._shape[1], generator) for form, part in pairs)
        elif self._form.source:
            self.packed = random_packed(self._form, self._parts, self._shape[1], generator)
        else:
            weight_OI = self._dense_weight()
            self._keep(weight_OI.normal_(0.0, self._shape[1] ** -0.5, generator=generator))
        if self.bias is not None:
            self.bias.zero_()

    def finalize(self) -> None:
        """Repack the loaded weight for the device; called once, after loading."""
        dtype = self.weight.dtype
        if isinstance(self.packed, PackedWeight):
            self.packed = held = held_weight(self.packed, self._form, dtype)
            if isinstance(held, PackedWeight) and held.power is not None:
                self._float8_rows = least_rounded_rows()
        elif self.pieces:
            pairs = zip(self.pieces, self._formats, strict=True)
            self.pieces = tuple(
                held_weight(each, form, dtype) for each, form in pairs if isinstance(each, PackedWeight)
            )
        elif (repacked := pack(self.weight)) is not self.weight:
            self.weight, self._multiply = repacked, matmul_repacked

    def weight_bytes(self) -> int:
        """Return the memory of weight and bias."""
        dense = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        held = self.pieces if self.packed is None else (self.packed,)
        packed = sum(weight.nbytes for weight in held)
        return dense * self.weight.dtype.itemsize + packed


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Rows ``rows`` of the checkpoint tensor called ``name`` (within the module's own prefix)."""

    name: str
    rows: range


class ColumnParallelLinear(Linear):
    """Compute this rank's outputs of several matrices over the same input, stacked in one weight."""

    def __init__(
        self,
        inputs: int,
        slices: tuple[RowSlice, ...],
        bias: bool,
        storage: Storage,
        counts: tuple[int, ...] = (),
    ) -> None:
        """``counts``: how many slices each format of ``storage.parts`` is for; one each if it is empty."""
        super().__init__(inputs, sum(len(part.rows) for part in slices), bias, storage)
        self.slices = slices
        self._parts = tuple(len(part.rows) for part in slices)
        self._pieces = _runs(slices, counts)
        self._piece_outputs = tuple(sum(len(part.rows) for part in piece) for piece in self._pieces)

    def load(self, reader: WeightReader, prefix: str) -> None:
        """Read this rank's rows of each of the matrices."""
        if self._formats:
            names = [[(f"{prefix}.{part.name}.weight", part.rows) for part in piece] for piece in self._pieces]
            self.pieces = tuple(map(reader.packed_rows, names))
        elif self._form.source:
            self.packed = reader.packed_rows([(f"{prefix}.{part.name}.weight", part.rows) for part in self.slices])
        else:
            self._load_dense(reader, prefix)
        if self.bias is not None:
            for part, bias in zip(self.slices, torch.split(self.bias, list(self._parts)), strict=True):
                reader.fill_rows(bias, f"{prefix}.{part.name}.bias", part.rows.start)

    def _load_dense(self, reader: WeightReader, prefix: str) -> None:
        weight_OI, first = self._dense_weight(), 0
        for part in self.slices:
            end = first + len(part.rows)
            reader.fill_rows(weight_OI[first:end], f"{prefix}.{part.name}.weight", part.rows.start)
            first = end
        self._keep_read(weight_OI, reader)


def _runs(slices: tuple[RowSlice, ...], counts: tuple[int, ...]) -> tuple[tuple[RowSlice, ...], ...]:
    """Return so many neighbours each; one each if no counts are given."""
    ends = list(itertools.accumulate(counts or (1,) * len(slices)))
    return tuple(slices[first:end] for first, end in itertools.pairwise((0, *ends)))


def qkv_slices(heads: HeadShard, head_dim: int) -> tuple[RowSlice, ...]:
    """Rows of q, k and v for one rank's heads; ranks that replicate a KV head read the same rows of k and v."""
    q_rows = range(heads.q_start * head_dim, heads.q_stop * head_dim)
    kv_rows = range(heads.kv_start * head_dim, heads.kv_stop * head_dim)
    return RowSlice("q_proj", q_rows), RowSlice("k_proj", kv_rows), RowSlice("v_proj", kv_rows)


def without_values(slices: tuple[RowSlice, ...]) -> tuple[RowSlice, ...]:
    """Return the rows of a layer that has no projection of values."""
    return tuple(part for part in slices if part.name != "v_proj")


def gated_slices(heads: HeadShard, head_dim: int) -> tuple[RowSlice, ...]:
    """Rows of q, k, v and the gates, where checkpoints have queries and gates of each head apart."""
    whole, q_heads = range(head_dim), range(heads.q_start, heads.q_stop)
    queries = tuple(RowSlice(f"q_proj.{head}", whole) for head in q_heads)
    gates = tuple(RowSlice(f"q_gate.{head}", whole) for head in q_heads)
    return *queries, *qkv_slices(heads, head_dim)[1:], *gates


class RowParallelLinear(Linear):
    """Multiply this rank's inputs by its columns and sum over the ranks; the bias is added once, after the sum."""

    def __init__(
        self,
        columns: range,
        outputs: int,
        bias: bool,
        group: TensorParallelGroup,
        storage: Storage,
        places: tuple[range, ...] = (),
    ) -> None:
        """``places``: where these columns are in the file, if they do not follow one another there."""
        self._places = places or (columns,)
        for place in self._places:
            storage = storage.whole_blocks(place)
        super().__init__(len(columns), outputs, bias, storage)
        self.columns = columns
        self.group = group

    def __call__(self, x_TI: Activations) -> Tensor:
        return summed_tensor(self.partial(x_TI))

    def partial(self, x_TI: Activations) -> Delta:
        """Return the sum, or this rank's part of it if the next norm adds the parts up."""
        if self.group.size == 1:
            return self._product(x_TI, self.bias)
        if self.packed is None and (sent := sent_product(x_TI, self.weight, self.bias, self.group)) is not None:
            return sent
        return sum_of_parts(self.part(x_TI), self.bias, self.group)

    def part(self, x_TI: Activations) -> Tensor:
        """Return this rank's part of the sum, without bias."""
        return scaled(self._product(x_TI, None))

    def load(self, reader: WeightReader, name: str) -> None:
        """Read this rank's columns."""
        if self._form.source:
            self.packed = reader.packed_columns(f"{name}.weight", *self._places)
        else:
            weight_OI, first = self._dense_weight(), 0
            for place in self._places:
                end = first + len(place)
                reader.fill_columns(weight_OI[:, first:end], f"{name}.weight", place.start)
                first = end
            self._keep_read(weight_OI, reader)
        if self.bias is not None:
            reader.fill_rows(self.bias, f"{name}.bias")
