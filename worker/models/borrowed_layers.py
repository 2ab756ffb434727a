"""What stands in the library's model in place of its own linear layers, of layers elsewhere, of base model and head."""

# T tokens, S rows that sample, D model dim, I inputs, O outputs

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.model.placement import HeadShard, even_range, head_shard
from mgpu.worker.layers.activations import scaled
from mgpu.worker.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear, RowSlice
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.vocab import VocabParallel
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.stage import BuildContext

_ATTENTION_PLAN = {
    "layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise",
}  # fmt: skip
PLANNED_HERE = ("hunyuan_v1_moe", "phimoe")
"""Families whose attention is split in the usual way, although the library's plan does not say so."""


class SkippedLayer(nn.Module):
    """A layer of another stage."""

    attention_type = ""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states


class Entry(SkippedLayer):
    """The first of the layers of other stages. What the code did before it was done by the first stage already."""

    x_1TD: Tensor

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.x_1TD


class NormInput(nn.Module):
    """In place of the base model while logits are computed: it returns rows that are normalized already."""

    x_1SD: Tensor

    def forward(self, *args: object, **kwargs: object) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.x_1SD)  # the plain one lacks attributes of this


class HeadProduct(nn.Module):
    """This rank's rows of the head."""

    def __init__(self, head: VocabParallel, bias: bool, device: torch.device) -> None:
        super().__init__()
        self._head = head
        rows = len(head.weight)
        self._bias_W = torch.zeros(rows, dtype=head.weight.dtype, device=device) if bias else None

    def forward(self, x_1SD: Tensor) -> Tensor:
        logits_SW = self._head.logits(x_1SD[0])
        return (logits_SW if self._bias_W is None else logits_SW + self._bias_W).unsqueeze(0)

    def load(self, reader: WeightReader) -> None:
        if self._bias_W is not None and self._head.num_valid:
            reader.fill_rows(self._bias_W[: self._head.num_valid], "lm_head.bias", self._head.start)


class Product(nn.Module):
    """A linear layer of mgpu, called as one of torch."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    @property
    def weight(self) -> Tensor:
        """The weight: some code asks for its type."""
        return self._linear.weight

    def forward(self, x: Tensor) -> Tensor:
        y_TO = self._linear(x.reshape(-1, x.shape[-1]))
        return scaled(y_TO).view(*x.shape[:-1], -1)


@dataclass
class NamedLinear(Module):
    """A linear layer and the name of its tensors."""

    linear: Linear
    name: str

    def load(self, reader: WeightReader) -> None:
        if isinstance(self.linear, ColumnParallelLinear):
            self.linear.load(reader, self.name.rpartition(".")[0])
        elif isinstance(self.linear, RowParallelLinear):
            self.linear.load(reader, self.name)


def replace_linears(base: Any, context: BuildContext) -> list[NamedLinear]:
    """Replace all linear layers of a base model; return the new ones.

    CheckpointError when they are to be split and the library's plan does not say how.
    """
    split = _Split(base.config, context)
    parts: list[NamedLinear] = []
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear:  # a subclass may compute something else
            part = NamedLinear(split.linear_of(name, module), f"model.{name}")
            parts.append(part)
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, Product(part.linear))
    return parts


class _Split:
    """Makes this rank's part of a linear layer, as the library's plan says.

    Heads go to ranks as in mgpu's own families: where there are fewer KV heads than ranks, ranks hold copies.
    """

    def __init__(self, config: Any, context: BuildContext) -> None:
        self._context = context
        self._group = context.group
        self._plan: dict[str, str] = config.base_model_tp_plan or {}
        if config.model_type in PLANNED_HERE:
            self._plan = _ATTENTION_PLAN | self._plan
        self._of = config.model_type
        facts = context.facts
        self._heads: HeadShard = head_shard(facts.num_q_heads, facts.num_kv_heads, self._group.rank, self._group.size)

    def linear_of(self, name: str, module: nn.Linear) -> Linear:
        way = self._way(name)
        rows, columns = range(module.out_features), range(module.in_features)
        bias, last = module.bias is not None, name.rpartition(".")[2]
        if way == "rowwise":
            mine = self._inputs_of(name, module.in_features)
            return RowParallelLinear(mine, len(rows), bias, self._group, self._context.storage)
        if way == "colwise":
            rows = self._outputs_of(last, module.out_features)
        return ColumnParallelLinear(len(columns), (RowSlice(last, rows),), bias, self._context.storage)

    def _way(self, name: str) -> str:
        """Return `colwise`, `rowwise`, or `whole`."""
        if self._group.size == 1:
            return "whole"
        way = self._plan.get(re.sub(r"\.\d+\.", ".*.", name), "whole")
        if ".self_attn." in f".{name}" and way not in ("colwise", "rowwise"):
            raise CheckpointError(
                f"transformers has no plan to split the attention of {self._of} over {self._group.size} ranks; "
                "use one worker, or give each its own layers with -n"
            )
        return way if way in ("colwise", "rowwise") else "whole"

    def _outputs_of(self, last: str, outputs: int) -> range:
        heads, size = self._heads, self._context.facts.head_dim
        if last == "q_proj":
            return range(heads.q_start * size, heads.q_stop * size)
        if last in ("k_proj", "v_proj"):
            return range(heads.kv_start * size, heads.kv_stop * size)
        return even_range(outputs, self._group.rank, self._group.size)

    def _inputs_of(self, name: str, inputs: int) -> range:
        heads, size = self._heads, self._context.facts.head_dim
        if ".self_attn." in f".{name}":
            return range(heads.q_start * size, heads.q_stop * size)
        return even_range(inputs, self._group.rank, self._group.size)
