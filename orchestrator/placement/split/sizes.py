"""Compute the bytes that each rank holds, from the shapes of the model alone."""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from mgpu.protocol.checkpoint.files.tensors import layer_tensors
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import (
    PlacementPlan,
    RankPlace,
    TensorPart,
    head_shard,
    largest_expert_shard,
    padded_vocab,
)
from mgpu.protocol.model.quantization import Quant, formats_of, matrices_of, rank_matrices, vocab_formats

CUDA_FIXED_BYTES = 700 << 20
"""Estimate of a worker's CUDA context, cuBLAS workspaces and allocator slack; the worker measures the real value."""
NCCL_BYTES = 300 << 20
"""Estimate of NCCL's channel buffers for the communicators of one worker."""

_MATRICES = tuple(f"{kind}_proj.weight" for kind in ("q", "k", "v", "o", "gate", "up", "down", "out", "q_a", "q_b"))
_MATRICES += ("kv_a_proj_with_mqa.weight",)
"""Ends of the names of linear layers, which `rank_matrices` counts."""
_HEAD_MATRICES = re.compile(r"\.(q_proj|q_gate|query|key|value|gate)\.\d+\.weight$")
"""The same where each head has a tensor of its own."""


def _share(facts: ModelFacts, name: str, elements: int, tp_size: int, split: ExpertSplit) -> int:
    """Return the elements of a rank's part of a norm, a router, sinks or a bias, the largest part where they differ.

    Biases of column-parallel layers are split as their rows are, and so are the norms of whole heads; all else is whole
    on every rank.
    """
    module, kind = name.split(".")[-2:]
    if ".linear_attn." in name:
        return elements if module == "norm" else elements // tp_size
    if module in ("kv_b_proj", "k_b_proj", "v_b_proj"):
        return elements // tp_size
    if facts.experts is not None and ".experts." in name and split == "parallel":
        return elements * largest_expert_shard(facts.experts, split, tp_size)[0] // facts.experts.count
    if kind == "sinks" or (kind == "bias" and module == "q_proj"):
        return elements // tp_size
    if kind == "bias" and module in ("gate_proj", "up_proj"):
        return -(-elements // tp_size)
    if facts.norms_whole_heads and module == "q_norm":
        return elements // tp_size
    if (kind == "bias" and module in ("k_proj", "v_proj")) or (facts.norms_whole_heads and module == "k_norm"):
        held = head_shard(facts.num_q_heads, facts.num_kv_heads, 0, tp_size).num_kv
        return elements // facts.num_kv_heads * held
    return elements


def _other_elements(facts: ModelFacts, layer: int, tp_size: int, split: ExpertSplit, within: str = "") -> int:
    """Return the elements on a rank of all tensors of a layer that are no linear layers; of those within a part."""
    sums: dict[str, int] = {}
    for name, shape in layer_tensors(facts, layer).items():
        if within in name and not name.endswith(_MATRICES) and not _HEAD_MATRICES.search(name):
            kind = re.sub(r"\.experts\.\d+\.", ".experts.", name)
            sums[kind] = sums.get(kind, 0) + math.prod(shape)
    count = facts.experts.count if facts.experts is not None else 1
    return sum(
        _share(facts, name, size // count, tp_size, split) * count
        if ".experts." in name and split == "tensor"
        else _share(facts, name, size, tp_size, split)
        for name, size in sums.items()
    )


def edge_bytes(
    facts: ModelFacts, tp_size: int, first: bool, last: bool, dtype_bytes: int, quant: Quant = "none"
) -> int:
    """Return the bytes of a stage outside of its layers: embedding on the first, final norm and LM head on the last.

    A tied LM head is the embedding itself if one stage has both, else a copy. Their rows are padded.
    """
    rows = padded_vocab(facts.vocab_size, tp_size) // tp_size
    embedding, head = (form.matrix_bytes(rows, facts.hidden_size, dtype_bytes) for form in vocab_formats(facts, quant))
    needs_head = last and not (first and facts.tie_embeddings)
    per_layer = 0
    if first and (per := facts.per_layer) is not None:  # the table is split as the vocabulary is, the rest is whole
        width, held = facts.num_layers * per.size, padded_vocab(per.vocab_size, tp_size) // tp_size
        dense = width * facts.hidden_size + per.size
        per_layer = per.form.matrix_bytes(held, width, dtype_bytes) + dense * dtype_bytes
    others = facts.hidden_size if last else 0
    return first * embedding + needs_head * head + per_layer + others * dtype_bytes


@cache
def layer_bytes(
    facts: ModelFacts, layer: int, tp_size: int, dtype_bytes: int, quant: Quant, split: ExpertSplit = "tensor"
) -> int:
    """Return the bytes of a layer on one of ``tp_size`` ranks: quantized matrices with scales, the rest dense."""
    if facts.borrowed is not None and facts.borrowed.layer_elements:
        return -(-facts.borrowed.layer_elements[layer] // tp_size) * dtype_bytes
    rest = _other_elements(facts, layer, tp_size, split)
    formats = formats_of(facts, layer, quant)
    matrices = matrices_of(facts, tp_size, layer, split)
    return rest * dtype_bytes + sum(count * matrix.nbytes(formats, dtype_bytes) for matrix, count in matrices)


def expert_bytes(
    facts: ModelFacts, layers: Iterable[int], tp_size: int, dtype_bytes: int, quant: Quant, split: ExpertSplit
) -> int:
    """Return the bytes on a rank of the experts of some layers that have any: a part of their `layer_bytes`."""
    total = 0
    for layer in layers:
        formats = formats_of(facts, layer, quant)
        matrices = matrices_of(facts, tp_size, layer, split)
        held = [pair for pair in matrices if pair[0].held in ("gate_up", "down")]
        total += sum(count * matrix.nbytes(formats, dtype_bytes) for matrix, count in held)
        total += _other_elements(facts, layer, tp_size, split, within=".experts.") * dtype_bytes
    return total


def layers_bytes(
    facts: ModelFacts, layers: range, tp_size: int, dtype_bytes: int, quant: Quant, split: ExpertSplit = "tensor"
) -> int:
    """Return the bytes of some layers on a rank. Those of one kind are alike, in equal formats."""
    if facts.borrowed is not None:
        return sum(layer_bytes(facts, layer, tp_size, dtype_bytes, quant, split) for layer in layers)
    stored = facts.formats if quant == "none" else ()
    kinds = [(facts.kind_of(layer), stored[layer : layer + 1]) for layer in layers]
    return sum(
        kinds.count(kind) * layer_bytes(facts, layers[kinds.index(kind)], tp_size, dtype_bytes, quant, split)
        for kind in set(kinds)
    )


def active_bytes(facts: ModelFacts, dtype_bytes: int, quant: Quant) -> tuple[int, int]:
    """Return the bytes of all weights, and of those that the computation of one token uses."""
    layers, edges = range(facts.num_layers), edge_bytes(facts, 1, True, True, dtype_bytes, quant)
    total = layers_bytes(facts, layers, 1, dtype_bytes, quant) + edges
    if facts.experts is None:
        return total, total
    if facts.borrowed is not None and facts.borrowed.layer_elements:
        idle = sum(facts.experts.sparse_layers) * (facts.experts.count - facts.experts.active)
        return total, total - idle * 3 * facts.experts.width * facts.hidden_size * dtype_bytes
    few = replace(facts, experts=replace(facts.experts, count=facts.experts.active))
    routers = sum(facts.experts.sparse_layers) * (facts.experts.count - facts.experts.active) * facts.hidden_size
    return total, layers_bytes(few, layers, 1, dtype_bytes, quant) + routers * dtype_bytes + edges


def largest_matrix_bytes(facts: ModelFacts, tp_size: int, dtype_bytes: int, split: ExpertSplit = "tensor") -> int:
    """Return the bytes of a rank's largest linear weight while it is dense."""
    kinds = {facts.kind_of(layer): layer for layer in range(facts.num_layers)}
    shapes = {shape for layer in kinds.values() for shape in rank_matrices(facts, tp_size, layer, split)}
    return max(map(math.prod, shapes)) * dtype_bytes


def part_facts(facts: ModelFacts, part: TensorPart, quant: Quant, split: ExpertSplit) -> ModelFacts:
    """Return the facts of a model that is as large as a rank's part, where ranks have unequal shares.

    One rank of that model holds what this rank holds.
    """
    heads = part.heads(facts.num_q_heads, facts.num_kv_heads)
    formats = formats_of(facts, 0, quant)
    experts = facts.experts
    if experts is not None:
        shard = part.experts(experts, split, formats.down.splits_at)
        shared = len(part.columns(experts.shared_width, formats.shared_down.splits_at)) if experts.shared_width else 0
        active = min(experts.active, len(shard.experts))
        experts = replace(
            experts, count=len(shard.experts), active=active, width=len(shard.columns), shared_width=shared
        )
    return replace(
        facts,
        num_q_heads=heads.num_q,
        num_kv_heads=heads.num_kv,
        intermediate_size=len(part.columns(facts.intermediate_size, formats.down.splits_at)),
        vocab_size=len(part.vocabulary(facts.vocab_size)[part.rank]),
        experts=experts,
    )


def rank_weight_bytes(
    facts: ModelFacts,
    plan: PlacementPlan,
    place: RankPlace,
    dtype_bytes: int,
    quant: Quant = "none",
    split: ExpertSplit = "tensor",
) -> int:
    """Return the bytes of all weights that one rank of a plan holds, the most of its stage."""
    stage = plan.stages[place.stage_index]
    layers = range(stage.first_layer, stage.end_layer)
    first, last = place.stage_index == 0, place.stage_index == plan.num_stages - 1
    edges = edge_bytes(facts, place.tp_size, first, last, dtype_bytes, quant)
    return layers_bytes(facts, layers, place.tp_size, dtype_bytes, quant, split) + edges


def kv_token_bytes(facts: ModelFacts, layers: Iterable[int], tp_size: int, element_bytes: int) -> int:
    """Return the KV-cache bytes of one token on a rank of some layers, of which linear ones have none."""
    own = [facts.of_layer(layer) for layer in layers if not facts.is_linear(layer)]
    own = [each for each in own if each.has_own_keys]
    held = [head_shard(each.num_q_heads, each.num_kv_heads, 0, tp_size).num_kv * each.cached_values for each in own]
    return sum(held) * element_bytes


def state_bytes(facts: ModelFacts, layers: range, tp_size: int, dtype_bytes: int) -> int:
    """Return the bytes of the states of one sequence on a rank of some layers; 0 if none is linear."""
    if facts.linear is None:
        return 0
    return facts.linear.state_bytes(facts.count_linear(layers), tp_size, dtype_bytes)


def step_bytes(
    facts: ModelFacts, tp_size: int, last: bool, dtype_bytes: int, max_batch_tokens: int, max_rows: int
) -> int:
    """Estimate the largest activations of one step on a rank.

    Residual stream, its norm and a partial sum; QKV and attention output; gate, up and their product, of all experts
    of a token with their outputs; on the last stage float32 logits of every row, three times over for sampling.
    """
    kinds = (facts, facts.of_layer(facts.num_layers - 1))  # the last layer has the widest heads, if any are wider
    qkv = max((2 * each.num_q_heads + 2 * max(each.num_kv_heads, tp_size)) * each.head_dim // tp_size for each in kinds)
    if facts.latent is not None:  # queries and attention output, both also as wide as the cache
        heads = facts.num_q_heads // tp_size * (facts.latent.head_dim + facts.latent.value_dim + 2 * facts.head_dim)
        qkv = heads + facts.latent.query_rank + facts.latent.width
    if facts.linear is not None:  # projections, the convolution's result, and heads in float32
        linear = 2 * facts.linear.channels(tp_size) + 2 * facts.linear.value_heads * facts.linear.value_dim // tp_size
        qkv = max(qkv, 4 * linear)
    width = 4 * facts.hidden_size + qkv + _mlp_elements(facts, tp_size)
    if facts.per_layer is not None:  # from the table, from the embedding, and their sum
        width += 3 * facts.num_layers * facts.per_layer.size
    logits = 3 * 4 * max_rows * padded_vocab(facts.vocab_size, tp_size) // tp_size if last else 0
    return max_batch_tokens * width * dtype_bytes + logits


def _mlp_elements(facts: ModelFacts, tp_size: int) -> int:
    """Return the largest activations of one token in a feed-forward network, where each rank has its share."""
    dense, experts = 3 * facts.intermediate_size * facts.sharing_width // tp_size, facts.experts
    if experts is None:
        return dense
    sparse = experts.active * (3 * experts.width // tp_size + facts.hidden_size)
    return sparse if all(experts.sparse_layers) else max(dense, sparse)
