"""The formats in which a rank may hold the weights of its linear layers, and how many bytes they take.

Planner and workers share this arithmetic. Embedding, LM head, norms and biases keep the model's dtype. The layout of
the packed words is in ``worker/quantization/packing.py``.
"""

from dataclasses import dataclass
from typing import Literal

from mgpu.protocol.model.facts import ExpertSplit, ModelFacts
from mgpu.protocol.model.placement import head_shard, largest_expert_shard

Quant = Literal["none", "8", "4", "fp8"]
"""The values of ``--quant``: nothing, int8, group-wise int4, or float8 (e4m3)."""

FLOAT8_CAPABILITY = (8, 9)
"""CUDA compute capability of the first GPUs with instructions for float8, conversions and products (Ada)."""
INT4_GROUP = 32
"""Input channels that share an int4 scale and offset. Groups of 64 save a tenth of the bytes and cost small models more
quality (docs/quantization.md)."""
_WORDS_PER_BLOCK = 32
_SCALE_BYTES = 4
"""A float32 scale, or for int4 a scale and an offset in bfloat16."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The format of one rank's linear weights. ``group`` is 0 if all inputs of an output share a scale."""

    quant: Quant = "none"
    group: int = 0

    def matrix_bytes(self, outputs: int, inputs: int, dtype_bytes: int) -> int:
        """Return the bytes of a matrix: ``dtype_bytes`` per weight if not quantized, else padded words and scales."""
        if self.quant == "none":
            return outputs * inputs * dtype_bytes
        channels_per_word = 8 if self.quant == "4" else 4
        blocks = -(-inputs // (channels_per_word * _WORDS_PER_BLOCK))
        scales = -(-inputs // self.group) if self.group else 1
        return outputs * (4 * _WORDS_PER_BLOCK * blocks + _SCALE_BYTES * scales)

    @property
    def name(self) -> str:
        """The format in words, for the start-up log."""
        if self.quant == "4":
            return f"int4, groups of {self.group}"
        return {"none": "", "8": "int8", "fp8": "fp8 (e4m3)"}[self.quant]


DENSE = WeightFormat()


def weight_format(quant: Quant) -> WeightFormat:
    """Return the format that every rank uses."""
    return WeightFormat(quant, INT4_GROUP if quant == "4" else 0)


def group_problems(quant: Quant, facts: ModelFacts, tp_size: int, split: ExpertSplit = "tensor") -> list[str]:
    """Return a line for each kind of layer whose slices on ``tp_size`` ranks are not whole int4 groups."""
    if quant != "4" or tp_size == 1:
        return []
    split_inputs = {"attention output": facts.num_q_heads * facts.head_dim}
    experts = facts.experts
    if facts.has_dense_layers:
        split_inputs["MLP width"] = facts.intermediate_size
    if experts is not None and split == "tensor":
        split_inputs["expert width"] = experts.width
    if experts is not None and experts.shared_width:
        split_inputs["shared expert's width"] = experts.shared_width
    return [
        f"{name} {inputs} / {tp_size} ranks = {inputs / tp_size:g}, not a multiple of {INT4_GROUP} (int4 groups)"
        for name, inputs in split_inputs.items()
        if inputs % (tp_size * INT4_GROUP)
    ]


def rank_matrices(
    facts: ModelFacts, tp_size: int, layer: int = 0, split: ExpertSplit = "tensor"
) -> tuple[tuple[int, int], ...]:
    """Return (outputs, inputs) of the linear layers of one decoder layer on one rank, the largest of its stage."""
    heads = head_shard(facts.num_q_heads, facts.num_kv_heads, 0, tp_size)
    q_size, kv_size = heads.num_q * facts.head_dim, heads.num_kv * facts.head_dim
    hidden, count, width = facts.hidden_size, 1, -(-facts.intermediate_size // tp_size)
    if (experts := facts.experts_of(layer)) is not None:
        count, width = largest_expert_shard(experts, split, tp_size)
    mlp = ((2 * width, hidden), (hidden, width)) * count
    if experts is not None and experts.shared_width:
        shared = -(-experts.shared_width // tp_size)
        mlp += ((2 * shared, hidden), (hidden, shared))
    return ((q_size + 2 * kv_size, hidden), (hidden, q_size), *mlp)
