"""The router of a mixture of experts: every rank computes the whole of it, so all choose the same experts."""

# T tokens, D model dim, E experts, A active experts of a token, G groups of N experts, B groups that are kept

from typing import NamedTuple

import torch
from torch import Tensor

from mgpu.protocol.model.expert_facts import ExpertChoice, ExpertFacts
from mgpu.worker.layers.activations import scaled
from mgpu.worker.layers.linear import Linear, Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.loaders.reader import WeightReader

_LEAST = 1e-20
"""Keeps a sum of scores above zero."""


class Routing(NamedTuple):
    """The experts of each token, best first, and the weights of their outputs."""

    experts_TA: Tensor
    """int64."""
    weights_TA: Tensor
    """float32."""


class ExpertCorrection(Module):
    """What is added to the score of each expert for the choice only, in float32: it balances the use of experts."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.weight = torch.empty(count, dtype=torch.float32, device=device)

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, name)

    def init_dummy(self, generator: torch.Generator) -> None:
        self.weight.zero_()

    def weight_bytes(self) -> int:
        return self.weight.nbytes


class Router(Linear):
    """Score all experts and choose the best of each token. Never quantized: it is small, and a wrong choice is not."""

    def __init__(self, facts: ExpertFacts, hidden_size: int, storage: Storage) -> None:
        super().__init__(hidden_size, facts.count, facts.router_bias, Storage(storage.dtype, storage.device))
        self.facts = facts
        has_correction = facts.choice is not None and facts.choice.has_correction
        self.correction = ExpertCorrection(facts.count, storage.device) if has_correction else None

    def route(self, x_TD: Tensor) -> Routing:
        """Choose in float32."""
        if self.facts.choice is not None:
            return self._choose(scaled(self(x_TD)).float(), self.facts.choice)
        probabilities_TE = scaled(self(x_TD)).float().softmax(-1)
        weights_TA, experts_TA = torch.topk(probabilities_TE, self.facts.active, dim=-1)
        if self.facts.normalizes:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        return Routing(experts_TA, weights_TA)

    def _choose(self, logits_TE: Tensor, choice: ExpertChoice) -> Routing:
        scores_TE = logits_TE.sigmoid() if choice.scores == "sigmoid" else logits_TE.softmax(-1)
        if self.correction is None and choice.kept_groups == choice.groups:
            ranked_TE = logits_TE  # in the order of the scores, of which the largest may be equal
        else:
            ranked_TE = scores_TE if self.correction is None else scores_TE + self.correction.weight
        experts_TA = torch.topk(_in_best_groups(ranked_TE, choice), self.facts.active, dim=-1).indices
        weights_TA = scores_TE.gather(1, experts_TA)
        if self.facts.normalizes:
            weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + _LEAST)
        return Routing(experts_TA, weights_TA * choice.scale)

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, f"{name}.weight")
        if self.bias is not None:
            reader.fill_rows(self.bias, f"{name}.bias")
        if self.correction is not None:
            self.correction.load(reader, f"{name}.e_score_correction_bias")


def _in_best_groups(ranked_TE: Tensor, choice: ExpertChoice) -> Tensor:
    """Return the scores of experts in the best groups, and minus infinity for the others."""
    if choice.kept_groups == choice.groups:
        return ranked_TE
    ranked_TGN = ranked_TE.view(len(ranked_TE), choice.groups, -1)
    of_groups_TG = ranked_TGN.topk(choice.group_best, dim=-1).values.sum(-1)
    best_TB = of_groups_TG.topk(choice.kept_groups, dim=-1).indices
    is_out_TG = torch.ones_like(of_groups_TG, dtype=torch.bool).scatter_(1, best_TB, False)
    return ranked_TGN.masked_fill(is_out_TG.unsqueeze(2), -torch.inf).flatten(1)
