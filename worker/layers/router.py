"""The router of a mixture of experts: every rank computes the whole of it, so all choose the same experts."""

# T tokens, D model dim, E experts, A active experts of a token

from typing import NamedTuple

import torch
from torch import Tensor

from mgpu.protocol.model.facts import ExpertFacts
from mgpu.worker.layers.activations import scaled
from mgpu.worker.layers.linear import Linear, Storage
from mgpu.worker.loaders.reader import WeightReader


class Routing(NamedTuple):
    """The experts of each token, best first, and the weights of their outputs."""

    experts_TA: Tensor
    """int64."""
    weights_TA: Tensor
    """float32."""


class Router(Linear):
    """Score all experts and choose the best of each token. Never quantized: it is small, and a wrong choice is not."""

    def __init__(self, facts: ExpertFacts, hidden_size: int, storage: Storage) -> None:
        super().__init__(hidden_size, facts.count, facts.router_bias, Storage(storage.dtype, storage.device))
        self.facts = facts

    def route(self, x_TD: Tensor) -> Routing:
        """Choose in float32."""
        probabilities_TE = scaled(self(x_TD)).float().softmax(-1)
        weights_TA, experts_TA = torch.topk(probabilities_TE, self.facts.active, dim=-1)
        if self.facts.normalizes:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        return Routing(experts_TA, weights_TA)

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, f"{name}.weight")
        if self.bias is not None:
            reader.fill_rows(self.bias, f"{name}.bias")
