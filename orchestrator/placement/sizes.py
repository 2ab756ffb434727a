"""Compute the bytes that each rank holds, from the shapes of the model alone."""

import math

from mgpu.protocol.checkpoint.tensors import layer_tensors
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import PlacementPlan, RankPlace, head_shard, padded_vocab
from mgpu.protocol.model.quantization import Quant, rank_matrices, weight_format

CUDA_FIXED_BYTES = 700 << 20
"""Estimate of a worker's CUDA context, cuBLAS workspaces and allocator slack; the worker measures the real value."""
NCCL_BYTES = 300 << 20
"""Estimate of NCCL's channel buffers for the communicators of one worker."""

_KV_SPLIT = ("k_proj", "v_proj")
_MLP_SPLIT = ("gate_proj", "up_proj")


def _share(facts: ModelFacts, name: str, elements: int, tp_size: int) -> int:
    """Return the elements of a rank's part of one tensor, the largest part where they differ.

    Norms, and biases that are added after the sum, are whole on every rank.
    """
    module, kind = name.split(".")[-2:]
    if module in _MLP_SPLIT or (module == "down_proj" and kind == "weight"):
        return elements // facts.intermediate_size * -(-facts.intermediate_size // tp_size)
    if module == "q_proj" or (module == "o_proj" and kind == "weight"):
        return elements // tp_size
    if module in _KV_SPLIT:
        held = head_shard(facts.num_q_heads, facts.num_kv_heads, 0, tp_size).num_kv
        return elements // facts.num_kv_heads * held
    return elements


def edge_elements(facts: ModelFacts, tp_size: int, first: bool, last: bool) -> int:
    """Count the elements of a stage outside of its layers: embedding on the first, final norm and LM head on the last.

    A tied LM head is the embedding itself if one stage has both, else a copy. Their rows are padded.
    """
    table = padded_vocab(facts.vocab_size, tp_size) // tp_size * facts.hidden_size
    tables = int(first) + int(last) - int(first and last and facts.tie_embeddings)
    return tables * table + (facts.hidden_size if last else 0)


def layer_bytes(facts: ModelFacts, tp_size: int, dtype_bytes: int, quant: Quant) -> int:
    """Return the bytes of one layer on one of ``tp_size`` ranks: quantized matrices with scales, the rest dense.

    All layers have the same shapes.
    """
    elements = sum(_share(facts, name, math.prod(shape), tp_size) for name, shape in layer_tensors(facts, 0).items())
    form = weight_format(quant)
    matrices = rank_matrices(facts, tp_size)
    rest = elements - sum(math.prod(shape) for shape in matrices)
    return rest * dtype_bytes + sum(form.matrix_bytes(*shape, dtype_bytes) for shape in matrices)


def largest_matrix_bytes(facts: ModelFacts, tp_size: int, dtype_bytes: int) -> int:
    """Return the bytes of a rank's largest linear weight while it is dense."""
    return max(math.prod(shape) for shape in rank_matrices(facts, tp_size)) * dtype_bytes


def rank_weight_bytes(
    facts: ModelFacts, plan: PlacementPlan, place: RankPlace, dtype_bytes: int, quant: Quant = "none"
) -> int:
    """Return the bytes of all weights that one rank of a plan holds."""
    stage = plan.stages[place.stage_index]
    layers = stage.num_layers * layer_bytes(facts, place.tp_size, dtype_bytes, quant)
    first, last = place.stage_index == 0, place.stage_index == plan.num_stages - 1
    return layers + edge_elements(facts, place.tp_size, first, last) * dtype_bytes


def kv_token_bytes(facts: ModelFacts, num_layers: int, tp_size: int, element_bytes: int) -> int:
    """Return the KV-cache bytes of one token on a rank of ``num_layers`` layers."""
    held = head_shard(facts.num_q_heads, facts.num_kv_heads, 0, tp_size).num_kv
    return 2 * num_layers * held * facts.head_dim * element_bytes


def step_bytes(
    facts: ModelFacts, tp_size: int, last: bool, dtype_bytes: int, max_batch_tokens: int, max_rows: int
) -> int:
    """Estimate the largest activations of one step on a rank.

    Residual stream, its norm and a partial sum; QKV and attention output; gate, up and their product; on the last
    stage float32 logits of every row, three times over for sampling.
    """
    qkv = (2 * facts.num_q_heads + 2 * max(facts.num_kv_heads, tp_size)) * facts.head_dim // tp_size
    width = 4 * facts.hidden_size + qkv + 3 * facts.intermediate_size // tp_size
    logits = 3 * 4 * max_rows * padded_vocab(facts.vocab_size, tp_size) // tp_size if last else 0
    return max_batch_tokens * width * dtype_bytes + logits
