"""Which matrices the layers of a model have on a rank, in which formats, and what must divide for them."""

from dataclasses import dataclass
from typing import Literal

from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import block_range, head_shard, largest_expert_shard
from mgpu.protocol.model.weight_format import (
    DENSE,
    INT4_GROUP,
    LayerFormats,
    Quant,
    WeightFormat,
    uniform,
    weight_format,
)

__all__ = [
    "DENSE", "FLOAT8_CAPABILITY", "INT4_GROUP", "LayerFormats", "Quant", "RankMatrix", "WeightFormat", "formats_of",
    "group_problems", "matrices_of", "rank_matrices", "weight_format",
]  # fmt: skip

FLOAT8_CAPABILITY = (8, 9)
"""CUDA compute capability of the first GPUs with instructions for float8, conversions and products (Ada)."""


_MLP = "MLP width"


@dataclass(frozen=True, slots=True)
class RankMatrix:
    """One rank's part of a matrix, or of several that are stacked."""

    held: Literal["qkv", "out", "gate_up", "down", "shared_gate_up", "shared_down", "q_b"]
    parts: tuple[int, ...]
    """Outputs of each matrix of the stack."""
    inputs: int
    whole_inputs: int
    """Inputs of all ranks together, of which this one has ``inputs``; 0 if each has all of them."""
    pieces: tuple[int, ...] = ()
    """Outputs of each part that may have a format of its own; empty: the same as ``parts``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return sum(self.parts), self.inputs

    def nbytes(self, formats: LayerFormats, dtype_bytes: int) -> int:
        """Return the bytes that the part takes in its format."""
        if forms := formats.parts_of(self.held):
            pairs = zip(forms, self.pieces or self.parts, strict=True)
            return sum(form.matrix_bytes(outputs, self.inputs, dtype_bytes) for form, outputs in pairs)
        form: WeightFormat = getattr(formats, self.held)
        return form.matrix_bytes(*self.shape, dtype_bytes, self.parts, self.whole_inputs)


def formats_of(facts: ModelFacts, layer: int, quant: Quant) -> LayerFormats:
    """Return the formats of a layer: those of ``--quant``, else those of the checkpoint."""
    if quant != "none" or not facts.formats:
        return uniform(weight_format(quant))
    return facts.formats[layer]


def vocab_formats(facts: ModelFacts, quant: Quant) -> tuple[WeightFormat, WeightFormat]:
    """Return the formats of embedding and head: packed as in a GGUF file, dense if ``--quant`` reads it anew."""
    return (facts.embedding_format, facts.head_format) if quant == "none" else (DENSE, DENSE)


def group_problems(quant: Quant, facts: ModelFacts, tp_size: int, split: ExpertSplit = "tensor") -> list[str]:
    """Return a line for each kind of layer whose slices on ``tp_size`` ranks are not whole groups."""
    if tp_size == 1 or (quant == "none" and not facts.formats):
        return []
    found: dict[str, None] = {}
    stored = facts.formats if quant == "none" else ()
    kinds = {(facts.kind_of(layer), stored[layer : layer + 1]): layer for layer in range(facts.num_layers)}
    for layer in kinds.values():
        for name, inputs, form in _split_inputs(facts, layer, formats_of(facts, layer, quant), split):
            step = form.splits_at
            if form.block and name == _MLP and inputs // step >= tp_size:
                continue  # ranks may have different numbers of whole blocks
            if step > 1 and inputs % (tp_size * step):
                what = "int4 groups" if quant == "4" else f"groups of {form.name}"
                share = inputs / tp_size
                found[f"{name} {inputs} / {tp_size} ranks = {share:g}, not a multiple of {step} ({what})"] = None
    return list(found)


def _split_inputs(
    facts: ModelFacts, layer: int, formats: LayerFormats, split: ExpertSplit
) -> list[tuple[str, int, WeightFormat]]:
    """Return the inputs that ranks share out, what they are called, and the format of the matrix."""
    inputs, linear = facts.of_layer(layer).out_inputs, facts.linear
    if linear is not None and linear.layers[layer]:
        # Where heads are tiled, a rank has some columns of each tile.
        inputs = (linear.key_heads if linear.values_are_tiled else linear.value_heads) * linear.value_dim
    found = [("attention output", inputs, formats.out)]
    experts = facts.experts_of(layer)
    if experts is None:
        return [*found, (_MLP, facts.of_layer(layer).intermediate_size, formats.down)]
    if split == "tensor":
        found.append(("expert width", experts.width, formats.down))
    if experts.shared_width:
        found.append(("shared expert's width", experts.shared_width, formats.shared_down))
    return found


def matrices_of(
    facts: ModelFacts, tp_size: int, layer: int = 0, split: ExpertSplit = "tensor"
) -> tuple[tuple[RankMatrix, int], ...]:
    """Return the matrices of one decoder layer on one rank, the largest of its stage, each with its number."""
    intermediate = facts.of_layer(layer).intermediate_size
    block = facts.formats[layer].down.block if facts.formats else 0
    widths = (len(block_range(intermediate, rank, tp_size, block)) for rank in range(tp_size))
    hidden, count, width = facts.hidden_size, 1, max(widths)
    whole_width = intermediate
    if (experts := facts.experts_of(layer)) is not None:
        count, width = largest_expert_shard(experts, split, tp_size)
        whole_width = experts.width
    found = [
        *((matrix, 1) for matrix in _attention_matrices(facts, tp_size, layer)),
        (RankMatrix("gate_up", (width, width), hidden, 0), count),
        (RankMatrix("down", (hidden,), width, whole_width), count),
    ]
    if experts is not None and experts.shared_width:
        shared = -(-experts.shared_width // tp_size)
        found += [
            (RankMatrix("shared_gate_up", (shared, shared), hidden, 0), 1),
            (RankMatrix("shared_down", (hidden,), shared, experts.shared_width), 1),
        ]
    return tuple(found)


def _attention_matrices(facts: ModelFacts, tp_size: int, layer: int) -> tuple[RankMatrix, ...]:
    """Return the projections of attention of any kind on one rank."""
    hidden, linear = facts.hidden_size, facts.linear
    if linear is not None and linear.layers[layer]:
        heads = linear.key_heads // tp_size
        value = linear.value_heads // linear.key_heads * linear.value_dim
        parts = (linear.key_dim,) * 2 * heads + (value,) * 2 * heads
        whole = linear.value_heads * linear.value_dim
        both = (2 * linear.key_dim + value) * heads, value * heads
        return RankMatrix("qkv", parts, hidden, 0, both), RankMatrix("out", (hidden,), whole // tp_size, whole)
    if facts.latent is not None:
        return _latent_matrices(facts, facts.latent, tp_size)
    facts = facts.of_layer(layer)
    shard = head_shard(facts.num_q_heads, facts.num_kv_heads, 0, tp_size)
    q_size, kv_size = shard.num_q * facts.head_dim, shard.num_kv * facts.head_dim
    queries = (facts.head_dim,) * 2 * shard.num_q if facts.attention_gate else (q_size,)
    keys = [kv_size] * len(facts.kv_parts)
    pieces = (q_size, *keys, q_size) if facts.attention_gate else ()
    out = RankMatrix("out", (hidden,), q_size, facts.out_inputs)
    return RankMatrix("qkv", (*queries, *keys), hidden, 0, pieces), out


def _latent_matrices(facts: ModelFacts, latent: LatentFacts, tp_size: int) -> tuple[RankMatrix, ...]:
    """Return the projections of latent attention. Each rank has all of those that heads share."""
    queries = facts.num_q_heads // tp_size * latent.head_dim
    out = RankMatrix("out", (facts.hidden_size,), facts.out_inputs // tp_size, facts.out_inputs)
    first = RankMatrix("qkv", (latent.query_rank or queries, latent.width), facts.hidden_size, 0)
    if not latent.query_rank:
        return first, out
    return first, out, RankMatrix("q_b", (queries,), latent.query_rank, 0)


def rank_matrices(
    facts: ModelFacts, tp_size: int, layer: int = 0, split: ExpertSplit = "tensor"
) -> tuple[tuple[int, int], ...]:
    """Return (outputs, inputs) of the linear layers of one decoder layer on one rank, the largest of its stage."""
    matrices = matrices_of(facts, tp_size, layer, split)
    return tuple(matrix.shape for matrix, count in matrices for _ in range(count))
