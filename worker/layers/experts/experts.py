"""The experts of one layer, as one rank holds them: a slice of each, or some of them whole.

Either way a rank computes a part of the sum over the chosen experts of a token, and the ranks' parts are added up like
those of a row-parallel layer. So both splits take one all-reduce, and no token moves between ranks.
"""

# T tokens, D model dim, N experts of this rank, F width of an expert on this rank, A active experts of a token
# O outputs and I inputs of one matrix, R tokens of one expert

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.expert_facts import Clamp, ExpertFacts
from mgpu.protocol.model.facts import Activation
from mgpu.protocol.model.placement import ExpertShard
from mgpu.worker.kernels.cpu.experts import ExpertMatrix, ExpertsKernel, has_kernels
from mgpu.worker.kernels.cpu.tiles import TiledWeight
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.experts.router import Routing
from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.products.choose import quantized_matmul
from mgpu.worker.layers.products.cpu_matmul import matmul
from mgpu.worker.layers.products.cpu_packed import CpuWeight, multiply, repack
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.quantization.packing import PackedWeight
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.random_packed import random_packed
from mgpu.worker.quantization.stacks import empty_stack, matrix_of, put_matrix

_DRAWN = 1
"""Experts of a layer that random weights on a CPU are drawn for."""


class ExpertMatrices(Module):
    """One matrix [O, I] of each expert, stacked: dense [N, O, I], or packed in stacks of words and scales.

    Experts that are to be quantized are dense one at a time, while they are loaded.
    """

    def __init__(self, count: int, parts: tuple[int, ...], inputs: int, bias: bool, storage: Storage) -> None:
        outputs = sum(parts)
        self._shape = (outputs, inputs)
        self._storage = storage
        is_dense = storage.form.quant == "none"
        self.weight = torch.empty((count if is_dense else 0, *self._shape), dtype=storage.dtype, device=storage.device)
        self.packed: PackedWeight | None = None
        self._repacked: list[CpuWeight] = []
        """Each expert's matrix as kernels for the CPU take it, instead of ``packed``."""
        self.bias = torch.empty((count, outputs), dtype=storage.dtype, device=storage.device) if bias else None
        self._count = count
        self._parts = parts
        self.form = storage.form

    @property
    def held(self) -> Tensor | PackedWeight:
        """The stack, quantized or dense."""
        return self.weight if self.packed is None else self.packed

    def dense(self, expert: int) -> Tensor:
        """Return undefined memory [O, I] to load an expert into; `keep` keeps the result."""
        return self.weight[expert] if self._storage.form.quant == "none" else self.weight.new_empty(self._shape)

    def keep(self, expert: int, weight_OI: Tensor, reader: WeightReader | None = None) -> None:
        if self._storage.form.quant == "none":
            return
        if reader is not None:
            reader.wait()
        self.put(expert, quantize(weight_OI, self._storage.form))

    def put(self, expert: int, matrix: PackedWeight) -> None:
        """Keep a packed matrix."""
        if self.packed is None:
            self.packed = empty_stack(matrix, self._count)
        put_matrix(self.packed, expert, matrix)

    def finalize(self) -> None:
        """Repack the matrices for the CPU's kernels if they are there, once, after loading."""
        if self.packed is None or self.weight.device.type != "cpu":
            return
        first = repack(matrix_of(self.packed, 0), self._storage.dtype)
        if isinstance(first, PackedWeight):
            return
        others = _repacked(self.packed, range(1, self._count), self._storage.dtype)
        repacked = [first, *(each for each in others if not isinstance(each, PackedWeight))]
        if len(repacked) == self._count:
            self._repacked, self.packed = repacked, None

    def for_kernel(self) -> ExpertMatrix | None:
        """Return the matrices as the kernel for all experts takes them; None if they have another form."""
        if self._storage.dtype != torch.bfloat16 or self.weight.device.type != "cpu" or self.packed is not None:
            return None
        tiles = [each for each in self._repacked if isinstance(each, TiledWeight)]
        if len(tiles) == self._count:
            return ExpertMatrix(tiles, self.bias)
        return ExpertMatrix(self.weight, self.bias) if len(self.weight) == self._count else None

    def multiply(self, x_RI: Tensor, expert: int) -> Tensor:
        """Multiply by one expert's matrix."""
        bias_O = None if self.bias is None else self.bias[expert]
        if self._repacked:
            return multiply(x_RI, self._repacked[expert], bias_O)
        if self.packed is not None:
            return quantized_matmul(x_RI, matrix_of(self.packed, expert), bias_O)
        return matmul(x_RI, self.weight[expert], bias_O)

    def init_dummy(self, generator: torch.Generator) -> None:
        """Draw weights that keep the scale of their input. On a CPU, which draws slowly, experts repeat the first."""
        drawn = min(self._count, _DRAWN) if self.weight.device.type == "cpu" else self._count
        for expert in range(drawn):
            if self.form.source:
                self.put(expert, random_packed(self.form, self._parts, self._shape[1], generator))
                continue
            weight_OI = self.dense(expert).normal_(0.0, self._shape[1] ** -0.5, generator=generator)
            self.keep(expert, weight_OI)
        for tensor in self._stacks():
            for first in range(drawn, self._count, max(1, drawn)):
                tensor[first : first + drawn] = tensor[: min(drawn, self._count - first)]
        if self.bias is not None:
            self.bias.zero_()

    def _stacks(self) -> tuple[Tensor, ...]:
        """Return the tensors of weights, whose first dimension is that of experts."""
        return (self.weight,) if self.packed is None else self.packed.tensors()

    def weight_bytes(self) -> int:
        packed = sum(each.nbytes for each in self._repacked) if self.packed is None else self.packed.nbytes
        return self.weight.nbytes + packed + (0 if self.bias is None else self.bias.nbytes)


def _repacked(stack: PackedWeight, experts: range, dtype: torch.dtype) -> list[CpuWeight | PackedWeight]:
    """Repack matrices of a stack side by side: each is small, so torch's threads would mostly wait for each other."""

    @torch.inference_mode()  # threads do not inherit it
    def repack_one(expert: int) -> CpuWeight | PackedWeight:
        return repack(matrix_of(stack, expert), dtype)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(repack_one, experts))
    finally:
        torch.set_num_threads(threads)  # what was set for the pool holds for threads to come, too


class Experts(Module):
    """This rank's share of all experts: ``down(act(gate(x)) * up(x))`` of each."""

    def __init__(
        self, facts: ExpertFacts, hidden_size: int, activation: Activation, shard: ExpertShard, storage: Storage
    ) -> None:
        self.facts = facts
        self.activation = activation
        self.shard = shard
        width = len(shard.columns)
        self.gate_up = ExpertMatrices(len(shard.experts), (width, width), hidden_size, facts.bias, storage.of_gate_up())
        self.down = ExpertMatrices(len(shard.experts), (hidden_size,), width, facts.bias, storage.of_down())
        self.kernel: ExpertsKernel | None = None
        """Computes all experts at once on a CPU, where it can."""

    def finalize(self) -> None:
        """Repack the matrices for the device, once, after loading."""
        if self.kernel is not None or uses_kernels(self.gate_up.weight.device):
            return
        self.gate_up.finalize()
        self.down.finalize()
        gate_up, down = self.gate_up.for_kernel(), self.down.for_kernel()
        if gate_up is not None and down is not None and has_kernels():
            how = self.shard.experts.start, self.activation, self.facts.clamp
            self.kernel = ExpertsKernel(gate_up, down, *how)

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return this rank's part of the weighted sum over each token's experts, [T, D].

        Experts are visited in order, each with all of its tokens. Which ones have any is read on the host, so a GPU
        takes kernels instead.
        """
        if self.kernel is not None:
            return self.kernel(x_TD, *routing)
        out_TD = torch.zeros_like(x_TD)
        chosen = routing.experts_TA.flatten()
        places = chosen.argsort(stable=True)
        ends = chosen.bincount(minlength=self.facts.count).cumsum(0).tolist()
        weights = routing.weights_TA.flatten()
        for index, expert in enumerate(self.shard.experts):
            mine_R = places[ends[expert - 1] if expert else 0 : ends[expert]]
            if len(mine_R) == 0:
                continue
            tokens_R = mine_R // self.facts.active
            gate_RF, up_RF = self.gate_up.multiply(x_TD[tokens_R], index).chunk(2, dim=-1)
            hidden_RF = _gated(gate_RF, up_RF, self.activation, self.facts.clamp)
            y_RD = self.down.multiply(hidden_RF, index)
            out_TD.index_add_(0, tokens_R, y_RD * weights[mine_R].unsqueeze(1).to(y_RD.dtype))
        return out_TD

    def load(self, reader: WeightReader, prefix: str) -> None:
        """Read this rank's experts, and its columns of them."""
        names = [f"{prefix}.{expert}" for expert in self.shard.experts]
        self._load_gate_up(reader, names)
        self._load_down(reader, names)
        for index, name in enumerate(names):
            self._load_biases(reader, index, name)

    def _load_gate_up(self, reader: WeightReader, experts: list[str]) -> None:
        columns, width = self.shard.columns, len(self.shard.columns)
        names = [(f"{name}.gate_proj.weight", f"{name}.up_proj.weight") for name in experts]
        if self.gate_up.form.source:
            calls = [partial(reader.packed_rows, [(each, columns) for each in pair]) for pair in names]
            for index, matrix in enumerate(reader.in_background(calls)):
                self.gate_up.put(index, matrix)
            return
        for index, (gate, up) in enumerate(names):
            weight_OI = self.gate_up.dense(index)
            reader.fill_rows(weight_OI[:width], gate, columns.start)
            reader.fill_rows(weight_OI[width:], up, columns.start)
            self.gate_up.keep(index, weight_OI, reader)

    def _load_down(self, reader: WeightReader, experts: list[str]) -> None:
        columns = self.shard.columns
        names = [f"{name}.down_proj.weight" for name in experts]
        if self.down.form.source:
            calls = [partial(reader.packed_columns, name, columns) for name in names]
            for index, matrix in enumerate(reader.in_background(calls)):
                self.down.put(index, matrix)
            return
        for index, name in enumerate(names):
            weight_OI = self.down.dense(index)
            reader.fill_columns(weight_OI, name, columns.start)
            self.down.keep(index, weight_OI, reader)

    def _load_biases(self, reader: WeightReader, index: int, name: str) -> None:
        """Read an expert's biases. Of ranks that have slices of it, the first adds that of ``down``."""
        if self.gate_up.bias is None or self.down.bias is None:
            return
        columns, width = self.shard.columns, len(self.shard.columns)
        reader.fill_rows(self.gate_up.bias[index, :width], f"{name}.gate_proj.bias", columns.start)
        reader.fill_rows(self.gate_up.bias[index, width:], f"{name}.up_proj.bias", columns.start)
        if columns.start == 0:
            reader.fill_rows(self.down.bias[index], f"{name}.down_proj.bias")
        else:
            self.down.bias[index].zero_()


def _gated(gate_RF: Tensor, up_RF: Tensor, activation: Activation, clamp: Clamp | None) -> Tensor:
    if clamp is not None:
        gate_RF, up_RF = gate_RF.clamp(max=clamp.limit), up_RF.clamp(-clamp.limit, clamp.limit)
        return (up_RF + 1) * gate_RF * torch.sigmoid(gate_RF * clamp.alpha)
    hidden_RF = F.silu(gate_RF) if activation == "silu" else F.gelu(gate_RF, approximate="tanh")
    return hidden_RF.mul_(up_RF)
