"""Feed-forward network of a mixture of experts: a router, and the experts that it chooses for each token."""

# T tokens, D model dim

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgpu.protocol.model.expert_facts import ExpertFacts, ExpertSplit
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.activations import Activations, scaled
from mgpu.worker.layers.experts.cpu_experts import CpuExperts, HostRows
from mgpu.worker.layers.experts.experts import Experts
from mgpu.worker.layers.experts.router import Router
from mgpu.worker.layers.linear import Linear, Storage
from mgpu.worker.layers.mlp import GatedMLP
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta, sum_of_parts, summed_tensor
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup

if TYPE_CHECKING:
    from mgpu.worker.kernels.experts.choose import ExpertStacks


class SharedGate(Linear):
    """The share of each token in the output of the network that all tokens go through. Never quantized."""

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, f"{name}.weight")


class SparseMLP(Module):
    """The weighted sum over a token's experts, summed over the ranks."""

    def __init__(
        self,
        facts: ModelFacts,
        experts: ExpertFacts,
        split: ExpertSplit,
        group: TensorParallelGroup,
        storage: Storage,
        part: TensorPart | None = None,
        cpu_rows: HostRows | None = None,
    ) -> None:
        """``cpu_rows``: how rows reach experts on the CPU; None: the experts are on the device."""
        self._group = group
        part = part or TensorPart(group.rank, group.size)
        kernel_mlp = _kernel_mlp if experts.choice is None else _routed_kernel_mlp
        has_kernels = cpu_rows is None and has_kernels_for(experts, storage)
        self._compute = kernel_mlp() if has_kernels else _plain_mlp
        self.waits_for_host = not has_kernels and cpu_rows is None
        self._add_share = _kernel_share() if uses_kernels(storage.device) else _plain_share
        shard = part.experts(experts, split, storage.of_down().form.splits_at)
        self.router = Router(experts, facts.hidden_size, storage)
        sizes_of = experts, facts.hidden_size, facts.activation, shard, storage
        self.experts = Experts(*sizes_of) if cpu_rows is None else CpuExperts(*sizes_of, cpu_rows)
        self.shared: GatedMLP | None = None
        self.shared_gate: SharedGate | None = None
        if experts.shared_width:
            sizes = facts.hidden_size, experts.shared_width
            self.shared = GatedMLP(*sizes, facts.activation, False, group, storage.of_shared(), part)
        if experts.shared_gate:
            self.shared_gate = SharedGate(facts.hidden_size, 1, False, Storage(storage.dtype, storage.device))

    def __call__(self, x_TD: Activations) -> Delta:
        assert isinstance(x_TD, Tensor), "the norm before a router does not quantize"
        computed, is_complete = self._compute(self, x_TD)
        if not isinstance(computed, Tensor) and self.shared is None and self._group.size == 1:
            return computed
        y_TD = summed_tensor(computed)
        if self.shared is not None and not is_complete:
            shared_TD = self.shared.part(x_TD)
            if self.shared_gate is not None:
                y_TD = self._add_share(self.shared_gate, y_TD, shared_TD, x_TD)
            else:
                y_TD = y_TD.add_(shared_TD)
        return sum_of_parts(y_TD, None, self._group)

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.router.load(reader, f"{prefix}.gate")
        self.experts.load(reader, f"{prefix}.experts")
        if self.shared is not None:
            self.shared.load(reader, f"{prefix}.shared_expert")
        if self.shared_gate is not None:
            self.shared_gate.load(reader, f"{prefix}.shared_expert_gate")


def has_kernels_for(experts: ExpertFacts, storage: Storage) -> bool:
    """Return True if kernels compute the experts of a layer. Biases and clamped gates need packed groups."""
    forms = storage.of_gate_up().form, storage.of_down().form
    is_plain = not experts.bias and experts.clamp is None
    if not uses_kernels(storage.device) or not (is_plain or all(form.source and form.group for form in forms)):
        return False
    return all(map(_is_for_kernels, forms)) and len({form.quant == "none" for form in forms}) == 1


def _is_for_kernels(form: WeightFormat) -> bool:
    """Return True for formats of which grouped products have kernels: all but act-order and odd groups."""
    return not form.is_ordered and (form.group % 32 == 0 or (form.group == 16 and form.super_bytes > 0))


def _plain_share(gate: SharedGate, y_TD: Tensor, shared_TD: Tensor, x_TD: Tensor) -> Tensor:
    return y_TD.add_(shared_TD * torch.sigmoid(scaled(gate(x_TD))))


def _kernel_share() -> Callable[[SharedGate, Tensor, Tensor, Tensor], Tensor]:
    from mgpu.worker.kernels.layers.gates import add_share

    return lambda gate, y_TD, shared_TD, x_TD: add_share(y_TD, shared_TD, x_TD, gate.weight)


Compute = Callable[[SparseMLP, Tensor], tuple[Delta, bool]]
"""Returns the sum over each token's experts, and whether the shared network's output is in it."""


def _weighed(mlp: SparseMLP, x_TD: Tensor, weights_TA: Tensor) -> tuple[Tensor, Tensor]:
    """Return what experts take, and the weights of their outputs."""
    if not mlp.router.facts.weighs_inputs:
        return x_TD, weights_TA
    return x_TD * weights_TA.to(x_TD.dtype), torch.ones_like(weights_TA)


def _plain_mlp(mlp: SparseMLP, x_TD: Tensor) -> tuple[Delta, bool]:
    routing = mlp.router.route(x_TD)
    x_TD, weights_TA = _weighed(mlp, x_TD, routing.weights_TA)
    return mlp.experts(x_TD, routing._replace(weights_TA=weights_TA)), False


def _stacks(mlp: SparseMLP) -> "ExpertStacks":
    """Return the experts as kernels take them."""
    from mgpu.worker.kernels.experts.choose import ExpertStacks
    from mgpu.worker.kernels.experts.few import SharedNetwork

    experts, network = mlp.experts, None
    assert isinstance(experts, Experts), "no kernels compute experts on the CPU"
    takes_same = not mlp.router.facts.weighs_inputs
    if (shared := mlp.shared) is not None and takes_same and not shared.gate_up.pieces and not shared.down.pieces:
        gate_up, down = shared.gate_up.held, shared.down.held
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            network = SharedNetwork(gate_up, down, None if mlp.shared_gate is None else mlp.shared_gate.weight)
    first, biases = experts.shard.experts.start, (experts.gate_up.bias, experts.down.bias)
    held = experts.gate_up.held, experts.down.held
    return ExpertStacks(*held, first, experts.activation, network, biases, experts.facts.clamp)


def _kernel_mlp() -> Compute:
    from mgpu.worker.kernels.experts.choose import RouterWeights, sparse_mlp

    def compute(mlp: SparseMLP, x_TD: Tensor) -> tuple[Delta, bool]:
        router, stacks = mlp.router, _stacks(mlp)
        weights = RouterWeights(router.weight, router.facts.active, router.facts.normalizes, router.bias)
        return sparse_mlp(x_TD, weights, stacks), stacks.includes_shared(len(x_TD))

    return compute


def _routed_kernel_mlp() -> Compute:
    """Return the computation by kernels of experts that are chosen in groups, or by corrected scores."""
    from mgpu.worker.kernels.experts.choose import routed_experts
    from mgpu.worker.kernels.experts.choose_in_groups import MOST_GROUPS, choose_in_groups

    def choose(router: Router, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        facts, correction = router.facts, router.correction
        if facts.choice is None or facts.choice.groups > MOST_GROUPS:
            routing = router.route(x_TD)
            return routing.experts_TA.to(torch.int32), routing.weights_TA
        how = facts.choice, facts.active, facts.normalizes, None if correction is None else correction.weight
        return choose_in_groups(scaled(router(x_TD)), *how)

    def compute(mlp: SparseMLP, x_TD: Tensor) -> tuple[Delta, bool]:
        (experts_TA, weights_TA), stacks = choose(mlp.router, x_TD), _stacks(mlp)
        inputs_TD, weights_TA = _weighed(mlp, x_TD, weights_TA)
        return routed_experts(inputs_TD, stacks, (experts_TA, weights_TA)), stacks.includes_shared(len(x_TD))

    return compute
