"""Read the mixture of experts of a Hugging Face configuration."""

from mgpu.protocol.checkpoint.untrusted import Fields, Limit
from mgpu.protocol.model.facts import ExpertFacts

MOST_EXPERTS = 1 << 12


def expert_facts(fields: Fields, family: str, num_layers: int) -> ExpertFacts | None:
    """Return the experts of a family that has some, with the defaults of transformers; None for the others."""
    if family == "mixtral":
        width = fields.integer("intermediate_size", 14336, high=8 * Limit.HIDDEN)
        count, active = _counts(fields, "num_local_experts", 8, 2)
        return ExpertFacts(count, active, width, (True,) * num_layers, normalizes=True)
    if family == "qwen3_moe":
        width = fields.integer("moe_intermediate_size", 768, high=8 * Limit.HIDDEN)
        count, active = _counts(fields, _first_of(fields, "num_experts", "num_local_experts"), 128, 8)
        normalizes = fields.boolean("norm_topk_prob", False)
        return ExpertFacts(count, active, width, _sparse_layers(fields, num_layers), normalizes)
    return None


def _first_of(fields: Fields, *keys: str) -> str:
    """Return the first key that is present, or the first of all."""
    return next((key for key in keys if fields.has(key)), keys[0])


def _counts(fields: Fields, key: str, count: int, active: int) -> tuple[int, int]:
    count = fields.integer(key, count, high=MOST_EXPERTS)
    active = fields.integer("num_experts_per_tok", active, high=MOST_EXPERTS)
    if active > count:
        raise fields.error("num_experts_per_tok", f"is {active}, more than the {count} experts of {key}")
    return count, active


def _sparse_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Return which layers have experts: every `decoder_sparse_step`-th that `mlp_only_layers` does not name."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.list_of("mlp_only_layers", int) or []
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
