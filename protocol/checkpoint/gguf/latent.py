"""Read the sizes of latent attention of a GGUF file, and its factor on query-key products."""

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.checkpoint.gguf.tensors import Tensors
from mgpu.protocol.checkpoint.rope.rules import yarn_attention
from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.facts import LATENT

_LOG_UNIT = 0.1
"""Files of these families have `yarn_log_multiplier` multiplied by this, those of others do not."""


def gguf_latent(fields: Fields, family: str, tensors: Tensors) -> LatentFacts | None:
    """Return the sizes of a family with latent attention; None for the others. CheckpointError.

    Since keys have a projection of their own, files name the sizes of a head as `key_length_mla` and
    `value_length_mla`, and `key_length` is that of what is cached. Older files have no such keys.
    """
    if family not in LATENT:
        return None
    rotated = fields.integer("rope.dimension_count", low=2, high=Limit.HEAD_DIM)
    if rotated % 2:
        raise fields.error("rope.dimension_count", f"is {rotated}; rotary embeddings need an even number")
    end = "_mla" if fields.has("attention.key_length_mla") else ""
    head_dim = fields.integer(f"attention.key_length{end}", high=2 * Limit.HEAD_DIM)
    if head_dim <= rotated:
        raise fields.error(f"attention.key_length{end}", f"is {head_dim}, not more than the {rotated} that are rotated")
    has_rank = "blk.0.attn_q_a.weight" in tensors
    growth, growth_from = _query_growth(fields)
    return LatentFacts(
        rank=fields.integer("attention.kv_lora_rank", high=Limit.HEAD_DIM),
        rotated=rotated,
        plain=head_dim - rotated,
        value_dim=fields.integer(f"attention.value_length{end}", high=Limit.HEAD_DIM),
        query_rank=fields.integer("attention.q_lora_rank", high=Limit.HIDDEN) if has_rank else 0,
        query_growth=growth,
        growth_from=growth_from,
        keys_apart="blk.0.attn_k_b.weight" in tensors,
    )


def _query_growth(fields: Fields) -> tuple[float, int]:
    """Return how queries grow with their positions, and the context from which on they do."""
    if not fields.raw("attention.temperature_scale"):
        return 0.0, 1
    original = "rope.scaling.original_context_length"
    key = "attention.temperature_length" if fields.raw("attention.temperature_length") else original
    return fields.number("attention.temperature_scale"), fields.integer(key, high=Limit.POSITION)


def gguf_latent_scale(fields: Fields, latent: LatentFacts) -> float:
    """Return the factor on query-key products, which yarn with a logarithmic multiplier raises."""
    scale = float(latent.head_dim**-0.5)
    if fields.raw("rope.scaling.type") != "yarn" or not fields.raw("rope.scaling.yarn_log_multiplier"):
        return scale
    multiplier = fields.number("rope.scaling.yarn_log_multiplier") / _LOG_UNIT
    sharper = yarn_attention(fields.number("rope.scaling.factor"), multiplier)
    return scale * sharper * sharper
