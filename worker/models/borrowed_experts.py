"""Experts of the library's modules, computed by mgpu's: split over ranks, and on GPUs by grouped products.

Routers stay the library's. They choose on every rank, so all ranks choose the same experts.
"""

# T tokens, D model dim, A active experts of a token, F width of an expert

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.experts.experts import Experts
from mgpu.worker.layers.experts.router import Routing
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta, sum_of_parts, summed_tensor
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.stage import BuildContext
from mgpu.worker.ranks.collectives import TensorParallelGroup

_FLAGS = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
"""What the library says of experts that are computed as mgpu computes them."""
_TRIED_WIDTH = 8


class CalledExperts(nn.Module):
    """This rank's share of the experts, called as the library calls all of them; ranks' parts are added up."""

    def __init__(self, experts: Experts, group: TensorParallelGroup, device: torch.device) -> None:
        super().__init__()
        self._experts, self._group = experts, group
        self._has_kernels = uses_kernels(device)

    def forward(self, x_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> Tensor:
        if self._has_kernels:
            y_TD = summed_tensor(self._grouped(x_TD, experts_TA, weights_TA))
        else:
            y_TD = self._experts(x_TD, Routing(experts_TA, weights_TA.float()))
        return summed_tensor(sum_of_parts(y_TD, None, self._group))

    def _grouped(self, x_TD: Tensor, experts_TA: Tensor, weights_TA: Tensor) -> Delta:
        from mgpu.worker.kernels.experts.choose import ExpertStacks, routed_experts

        held = self._experts
        stacks = ExpertStacks(held.gate_up.held, held.down.held, held.shard.experts.start, held.activation)
        return routed_experts(x_TD, stacks, (experts_TA.to(torch.int32).contiguous(), weights_TA.float().contiguous()))


@dataclass
class NamedExperts(Module):
    """The experts of a layer and the name of their tensors."""

    experts: Experts
    name: str

    def load(self, reader: WeightReader) -> None:
        self.experts.load(reader, self.name)


def replace_experts(base: Any, context: BuildContext) -> list[NamedExperts]:
    """Replace the experts of all layers; return the new ones. CheckpointError for experts of another kind."""
    facts, group, storage = context.facts, context.group, context.storage
    if facts.experts is None:
        return []
    shard = context.part.experts(facts.experts, context.expert_split)
    parts: list[NamedExperts] = []
    for name, module in list(base.named_modules()):
        if not isinstance(getattr(module, "down_proj", None), nn.Parameter):
            continue
        activation = activation_of(module)
        shape = tuple(getattr(module, "gate_up_proj", torch.empty(0)).shape)
        expected = facts.experts.count, 2 * facts.experts.width, facts.hidden_size
        if activation is None or shape != expected:
            raise CheckpointError(
                f"transformers computes the experts of {facts.architecture} in a way that mgpu has not, or in sizes "
                f"other than config.json's ({expected} instead of {shape})"
            )
        experts = Experts(facts.experts, facts.hidden_size, activation, shard, storage)
        parts.append(NamedExperts(experts, f"model.{name}"))
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, CalledExperts(experts, group, storage.device))
    return parts


def activation_of(module: Any) -> Activation | None:
    """Return the activation of the library's experts, found by trying; None if they are none that mgpu computes."""
    if any(getattr(module, flag, value) is not value for flag, value in _FLAGS.items()):
        return None
    gate_up_TF = torch.linspace(-2.0, 3.0, 2 * _TRIED_WIDTH).unsqueeze(0)
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    with torch.inference_mode():
        found_TF = module._apply_gate(gate_up_TF)
    known: dict[Activation, Tensor] = {"silu": F.silu(gate_TF), "gelu_tanh": F.gelu(gate_TF, approximate="tanh")}
    matching = (name for name, active_TF in known.items() if torch.allclose(active_TF * up_TF, found_TF, atol=1e-6))
    return next(matching, None)
