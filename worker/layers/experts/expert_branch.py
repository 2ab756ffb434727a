"""Experts beside a dense network, each with norms of its own; the router has scales (Gemma 4)."""

# T tokens, D model dim, E experts, A active experts of a token

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.expert_facts import ExpertFacts, ExpertSplit
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.worker.layers.activations import Product
from mgpu.worker.layers.experts.cpu_experts import CpuExperts, HostRows
from mgpu.worker.layers.experts.experts import Experts
from mgpu.worker.layers.experts.router import Router, Routing
from mgpu.worker.layers.experts.sparse_mlp import has_kernels_for
from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.layers.partial_sum import Delta, sum_of_parts, summed, summed_tensor
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup

AnyExperts = Experts | CpuExperts


class RouterScales(Module):
    """What a router multiplies its input by, and the weights of the experts that it chooses."""

    def __init__(self, experts: ExpertFacts, hidden_size: int, storage: Storage) -> None:
        self.weight = torch.ones(hidden_size, dtype=storage.dtype, device=storage.device)
        """[D], of the input."""
        self.output_E = torch.ones(experts.count, dtype=storage.dtype, device=storage.device)

    def load(self, reader: WeightReader, prefix: str) -> None:
        reader.fill_rows(self.weight, f"{prefix}.scale")
        reader.fill_rows(self.output_E, f"{prefix}.per_expert_scale")

    def init_dummy(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)
        self.output_E.fill_(1.0)

    def weight_bytes(self) -> int:
        return self.weight.nbytes + self.output_E.nbytes


class ExpertBranch(Module):
    """Norms, router and experts of a layer whose dense network is computed elsewhere."""

    def __init__(
        self,
        facts: ModelFacts,
        experts: ExpertFacts,
        split: ExpertSplit,
        group: TensorParallelGroup,
        storage: Storage,
        part: TensorPart,
        cpu_rows: HostRows | None = None,
    ) -> None:
        """``cpu_rows``: how rows reach experts on the CPU; None: the experts are on the device."""

        def norm() -> RMSNorm:
            return RMSNorm(facts.hidden_size, facts.rms_norm_eps, storage.dtype, storage.device)

        self._group = group
        self._eps, self._root = facts.rms_norm_eps, facts.hidden_size**-0.5
        self.router = Router(experts, facts.hidden_size, storage)
        self.scales = RouterScales(experts, facts.hidden_size, storage)
        shard = part.experts(experts, split, storage.of_down().form.splits_at)
        sizes_of = experts, facts.hidden_size, facts.activation, shard, storage
        self.experts = Experts(*sizes_of) if cpu_rows is None else CpuExperts(*sizes_of, cpu_rows)
        has_kernels = cpu_rows is None and has_kernels_for(experts, storage)
        self._compute = _kernel_experts() if has_kernels else _plain_experts
        self.waits_for_host = not has_kernels and cpu_rows is None
        self.norm, self.out_norm, self.dense_out_norm = norm(), norm(), norm()

    def __call__(self, dense_TD: Product, residual_TD: Tensor) -> Tensor:
        """Return the sum of both branches: ``dense``, the output of the other one, and the experts of the stream."""
        routing = self._route(residual_TD)
        part_TD = summed_tensor(self._compute(self.experts, self.norm(residual_TD), routing))
        experts_TD = summed(sum_of_parts(part_TD, None, self._group))
        return self.dense_out_norm(dense_TD) + self.out_norm(experts_TD)

    def _route(self, x_TD: Tensor) -> Routing:
        """Choose the experts of each token of the residual stream."""
        normed_TD = F.rms_norm(x_TD.float(), x_TD.shape[-1:], eps=self._eps).to(x_TD.dtype)
        experts_TA, weights_TA = self.router.route(normed_TD * self.scales.weight * self._root)
        return Routing(experts_TA, weights_TA * self.scales.output_E[experts_TA].float())

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.router.load(reader, f"{prefix}.mlp.gate")
        self.scales.load(reader, f"{prefix}.router")
        self.experts.load(reader, f"{prefix}.mlp.experts")
        self.dense_out_norm.load(reader, f"{prefix}.post_feedforward_layernorm_1")
        self.norm.load(reader, f"{prefix}.pre_feedforward_layernorm_2")
        self.out_norm.load(reader, f"{prefix}.post_feedforward_layernorm_2")


def _plain_experts(experts: AnyExperts, x_TD: Tensor, routing: Routing) -> Delta:
    return experts(x_TD, routing)


def _kernel_experts() -> Callable[[AnyExperts, Tensor, Routing], Delta]:
    from mgpu.worker.kernels.experts.choose import ExpertStacks, routed_experts

    def compute(experts: AnyExperts, x_TD: Tensor, routing: Routing) -> Delta:
        assert isinstance(experts, Experts), "no kernels compute experts on the CPU"
        held = experts.gate_up.held, experts.down.held
        stacks = ExpertStacks(*held, experts.shard.experts.start, experts.activation)
        chosen = routing.experts_TA.to(torch.int32).contiguous(), routing.weights_TA.float().contiguous()
        return routed_experts(x_TD, stacks, chosen)

    return compute
