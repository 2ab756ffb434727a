"""Read the mixture of experts of a Hugging Face configuration."""

from dataclasses import replace

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.model.facts import Clamp, ExpertFacts

MOST_EXPERTS = 1 << 12
_ALL_SPARSE = {
    "mixtral": (14336, 8, 2),
    "granitemoe": (11008, 8, 2),
    "granitemoeshared": (11008, 8, 2),
    "gpt_oss": (2880, 128, 4),
}
"""Families with experts in every layer: default width, number and active ones."""

_QWEN = {
    "qwen2_moe": (1408, 60, 4, 5632),
    "qwen3_moe": (768, 128, 8, 0),
    "qwen3_next": (512, 512, 10, 512),
    "qwen3_5_moe": (512, 256, 8, 512),
}
"""Default width, number and active ones, and width of the network that all tokens go through."""


def expert_facts(fields: Fields, family: str, num_layers: int) -> ExpertFacts | None:
    """Return the experts of a family that has some, with the defaults of transformers; None for the others."""
    if family == "qwen3_next" and fields.raw("num_experts") == 0:
        return None
    if family in _QWEN:
        return _qwen(fields, family, num_layers)
    if family == "gemma4":
        return _gemma4(fields, num_layers) if fields.boolean("enable_moe_block", False) else None
    if family not in _ALL_SPARSE:
        return None
    width, count, active = _ALL_SPARSE[family]
    width = fields.integer("intermediate_size", width, high=8 * Limit.HIDDEN)
    count, active = _counts(fields, "num_local_experts", count, active)
    experts = ExpertFacts(count, active, width, (True,) * num_layers, normalizes=True)
    if family == "gpt_oss":
        clamp = Clamp(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0))
        return replace(experts, router_bias=True, bias=True, clamp=clamp)
    if family == "granitemoeshared":
        shared = fields.integer("shared_intermediate_size", 1024, low=0, high=8 * Limit.HIDDEN)
        return replace(experts, shared_width=shared)
    return experts


def _qwen(fields: Fields, family: str, num_layers: int) -> ExpertFacts:
    width, count, active, shared = _QWEN[family]
    width = fields.integer("moe_intermediate_size", width, high=8 * Limit.HIDDEN)
    count, active = _counts(fields, _first_of(fields, "num_experts", "num_local_experts"), count, active)
    if family == "qwen3_5_moe":  # its configuration has neither of the two keys
        normalizes, sparse = True, (True,) * num_layers
    else:
        normalizes = fields.boolean("norm_topk_prob", family == "qwen3_next")
        sparse = _sparse_layers(fields, num_layers)
    experts = ExpertFacts(count, active, width, sparse, normalizes)
    if not shared:
        return experts
    shared = fields.integer("shared_expert_intermediate_size", shared, high=8 * Limit.HIDDEN)
    return replace(experts, shared_width=shared, shared_gate=True)


def _gemma4(fields: Fields, num_layers: int) -> ExpertFacts:
    count, active = _counts(fields, "num_experts", None, None, active_key="top_k_experts")
    width = fields.integer("moe_intermediate_size", high=8 * Limit.HIDDEN)
    dense = fields.integer("intermediate_size", 9216, high=8 * Limit.HIDDEN)
    return ExpertFacts(count, active, width, (True,) * num_layers, normalizes=True, shared_width=dense, is_branch=True)


def _first_of(fields: Fields, *keys: str) -> str:
    """Return the first key that is present, or the first of all."""
    return next((key for key in keys if fields.has(key)), keys[0])


def _counts(
    fields: Fields, key: str, count: int | None, active: int | None, active_key: str = "num_experts_per_tok"
) -> tuple[int, int]:
    """Return the number of experts and of active ones; None: there is no default."""
    count = fields.integer(key, count, high=MOST_EXPERTS)
    active = fields.integer(active_key, active, high=MOST_EXPERTS)
    if active > count:
        raise fields.error(active_key, f"is {active}, more than the {count} experts of {key}")
    return count, active


def _sparse_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Return which layers have experts: every `decoder_sparse_step`-th that `mlp_only_layers` does not name."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.list_of("mlp_only_layers", int) or []
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
