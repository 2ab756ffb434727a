"""Feed-forward network of a mixture of experts: a router, and the experts that it chooses for each token."""

# T tokens, D model dim

from torch import Tensor

from mgpu.protocol.model.facts import ExpertFacts, ExpertSplit, ModelFacts
from mgpu.protocol.model.placement import expert_shard
from mgpu.worker.layers.activations import Activations
from mgpu.worker.layers.experts import Experts
from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta, sum_of_parts
from mgpu.worker.layers.router import Router
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup


class SparseMLP(Module):
    """The weighted sum over a token's experts, summed over the ranks."""

    def __init__(
        self, facts: ModelFacts, experts: ExpertFacts, split: ExpertSplit, group: TensorParallelGroup, storage: Storage
    ) -> None:
        self._group = group
        shard = expert_shard(experts, split, group.rank, group.size)
        self.router = Router(experts, facts.hidden_size, storage)
        self.experts = Experts(experts, facts.hidden_size, facts.activation, shard, storage)

    def __call__(self, x_TD: Activations) -> Delta:
        assert isinstance(x_TD, Tensor), "the norm before a router does not quantize"
        return sum_of_parts(self.experts(x_TD, self.router.route(x_TD)), None, self._group)

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.router.load(reader, f"{prefix}.gate")
        self.experts.load(reader, f"{prefix}.experts")
