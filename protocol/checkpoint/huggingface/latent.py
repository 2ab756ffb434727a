"""Read from config.json the sizes of latent attention, and its factor on query-key products."""

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.checkpoint.rope.rules import yarn_attention
from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.facts import LATENT

_DEFAULTS = {"deepseek_v2": (512, 64, 128, 1536), "deepseek_v3": (512, 64, 128, 1536), "mistral4": (256, 64, 64, 1024)}
"""Rank, rotated and plain components of a head, and rank of queries."""
_MISTRAL_4_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 128.0, "original_max_position_embeddings": 8192, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def latent_facts(fields: Fields, family: str) -> LatentFacts | None:
    """Return the sizes of a family with latent attention, with the defaults of transformers; None for the others."""
    if family not in LATENT:
        return None
    rank, rotated, plain, query_rank = _DEFAULTS[family]
    if fields.declares("q_lora_rank") and not fields.has("q_lora_rank"):
        query_rank = 0  # null: queries have one projection
    else:
        query_rank = fields.integer("q_lora_rank", query_rank, high=Limit.HIDDEN)
    rotated = fields.integer("qk_rope_head_dim", rotated, low=2, high=Limit.HEAD_DIM)
    if rotated % 2:
        raise fields.error("qk_rope_head_dim", f"is {rotated}; rotary embeddings need an even number")
    growth, growth_from = _query_growth(fields) if family == "mistral4" else (0.0, 1)
    return LatentFacts(
        rank=fields.integer("kv_lora_rank", rank, high=Limit.HEAD_DIM),
        rotated=rotated,
        plain=fields.integer("qk_nope_head_dim", plain, high=Limit.HEAD_DIM),
        value_dim=fields.integer("v_head_dim", 128, high=Limit.HEAD_DIM),
        query_rank=query_rank,
        is_interleaved=family == "deepseek_v2" or fields.boolean("rope_interleave", True),
        query_growth=growth,
        growth_from=growth_from,
    )


def _query_growth(fields: Fields) -> tuple[float, int]:
    """Return how queries grow with their positions, and the context from which on they do."""
    rope = fields.nested("rope_scaling") or fields.nested("rope_parameters")
    if rope is None or not rope.has("llama_4_scaling_beta") or rope.raw("llama_4_scaling_beta") == 0:
        return 0.0, 1
    return rope.number("llama_4_scaling_beta"), rope.integer("original_max_position_embeddings", high=Limit.POSITION)


def with_default_rope(fields: Fields, family: str) -> Fields:
    """Return the configuration with the scaling of rotary frequencies that a family has if none is named."""
    if family != "mistral4" or fields.has("rope_parameters") or fields.has("rope_scaling"):
        return fields
    return fields.with_value("rope_parameters", _MISTRAL_4_ROPE)


def latent_scale(fields: Fields, latent: LatentFacts) -> float:
    """Return the factor on query-key products, which yarn with `mscale_all_dim` raises."""
    scale = float(latent.head_dim**-0.5)
    rope = fields.nested("rope_scaling") or fields.nested("rope_parameters")
    if rope is None or rope.text("rope_type", rope.text("type", "default")) == "default":
        return scale
    if not rope.has("mscale_all_dim") or rope.raw("mscale_all_dim") == 0:
        return scale
    sharper = yarn_attention(rope.number("factor"), rope.number("mscale_all_dim"))
    return scale * sharper * sharper
