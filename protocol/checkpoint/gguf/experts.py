"""Read the mixture of experts of a GGUF file. Layers with a router have experts."""

from dataclasses import replace
from typing import Literal

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.checkpoint.gguf.families import SIGMOID, GgufFamily
from mgpu.protocol.checkpoint.gguf.tensors import Tensors
from mgpu.protocol.model.expert_facts import Clamp, ExpertChoice, ExpertFacts
from mgpu.protocol.model.facts import LATENT

_PLAIN = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "granitemoe", "granitemoeshared", "gpt_oss",
    "gemma4",
)  # fmt: skip
"""Families whose routers choose by a softmax over all experts."""
_GROUPED = (*LATENT, "glm4_moe")
"""Families with DeepSeek's kind of router."""
_OTHERS = ("minimax_m2", "llama4")
_WIDE = ("mixtral", "granitemoe", "granitemoeshared", "gpt_oss", "minimax_m2")
"""Families whose `feed_forward_length` is that of an expert."""
_BY_SIGMOID = ("deepseek_v3", "glm4_moe", "minimax_m2", "llama4")
_OWN_GATING = ("gpt_oss", "gemma4")
"""Families whose router is told by their name, whatever `expert_gating_func` says."""


def gguf_experts(
    fields: Fields, family: str, base: GgufFamily, num_layers: int, tensors: Tensors
) -> ExpertFacts | None:
    """Return the experts of a model; None if it has none. CheckpointError for numbers that cannot be."""
    if family not in (*_PLAIN, *_GROUPED, *_OTHERS):
        if fields.raw("expert_count"):
            raise fields.error(
                "expert_count", f"is {fields.raw('expert_count')!r}, which is not supported for {family}"
            )
        _refuse_unsupported(fields, family)
        return None
    if family in ("gemma4", "llama4", *_GROUPED) and fields.raw("expert_count") in (None, 0):
        return None
    _refuse_unsupported(fields, family)
    count = fields.integer("expert_count", high=Limit.EXPERTS)
    if not fields.has("expert_used_count"):
        raise fields.error("expert_count", f"is {count}, and expert_used_count is missing")
    active = fields.integer("expert_used_count", high=Limit.EXPERTS)
    if active > count:
        raise fields.error("expert_used_count", f"is {active}, more than the {count} experts of expert_count")
    experts = ExpertFacts(
        count,
        active,
        _width(fields, family, active),
        tuple(f"blk.{layer}.ffn_gate_inp.weight" in tensors for layer in range(num_layers)),
        normalizes=fields.boolean("expert_weights_norm", base.norms_weights),
    )
    return _of_family(fields, family, experts, tensors)


def _of_family(fields: Fields, family: str, experts: ExpertFacts, tensors: Tensors) -> ExpertFacts:
    """Return the experts with what only some families have."""
    if family == "gpt_oss":
        return replace(experts, router_bias=True, bias=True, clamp=Clamp(1.702, 7.0))
    if family in ("qwen2_moe", "qwen3_next", "qwen3_5_moe", "granitemoeshared"):
        shared = _shared_width(fields, _feed_forward(fields, experts.width))
        return replace(experts, shared_width=shared, shared_gate=family != "granitemoeshared")
    if family == "gemma4":
        return replace(experts, shared_width=_feed_forward(fields, None), is_branch=True)
    if family == "minimax_m2":
        return replace(experts, choice=ExpertChoice("sigmoid", has_correction=_has_correction(experts, tensors)))
    if family == "llama4":
        if experts.active != 1:
            raise fields.error("expert_used_count", f"is {experts.active}; llama4 is supported with 1 expert of each")
        return replace(
            experts, normalizes=False, shared_width=experts.width, choice=ExpertChoice("sigmoid"), weighs_inputs=True
        )
    if family not in _GROUPED:
        return experts
    shared = fields.integer("expert_shared_count", 0, low=0, high=Limit.EXPERTS) * experts.width
    return replace(
        experts,
        shared_width=_shared_width(fields, shared) if shared else 0,
        choice=_choice(fields, family, experts, tensors),
    )


def _choice(fields: Fields, family: str, experts: ExpertFacts, tensors: Tensors) -> ExpertChoice | None:
    """Return how a router of DeepSeek's kind chooses; None: by a softmax over all. CheckpointError for its groups."""
    scores: Literal["sigmoid", "softmax"] = "sigmoid" if family in _BY_SIGMOID else "softmax"
    scale = 1.0 if fields.raw("expert_weights_scale") == 0 else fields.number("expert_weights_scale", 1.0)
    groups = fields.integer("expert_group_count", 1, low=0, high=Limit.EXPERTS) or 1
    kept = fields.integer("expert_group_used_count", groups, low=0, high=Limit.EXPERTS) or groups
    best = 1 if family == "deepseek_v2" else 2
    has_correction = _has_correction(experts, tensors)
    if groups == 1:
        is_plain = scores == "softmax" and scale == 1.0 and not has_correction
        return None if is_plain else ExpertChoice(scores, has_correction=has_correction, scale=scale)
    size = experts.count // groups
    if experts.count % groups or size < best:
        raise fields.error(
            "expert_group_count", f"is {groups}: {experts.count} experts are no groups of {best} or more"
        )
    if kept > groups or experts.active > kept * size:
        raise fields.error(
            "expert_group_used_count",
            f"is {kept}: {experts.active} experts of a token are not in {kept} of {groups} groups of {size}",
        )
    return ExpertChoice(scores, groups, kept, best, has_correction, scale)


def _has_correction(experts: ExpertFacts, tensors: Tensors) -> bool:
    """Return True if the layers with experts have numbers that are added to scores for the choice."""
    layers = [layer for layer, is_sparse in enumerate(experts.sparse_layers) if is_sparse]
    return any(f"blk.{layer}.exp_probs_b.bias" in tensors for layer in layers)


def _width(fields: Fields, family: str, active: int) -> int:
    default = _feed_forward(fields, 1)
    default = default if family in _WIDE else max(1, default // active)
    return fields.integer("expert_feed_forward_length", default, high=8 * Limit.HIDDEN)


def _feed_forward(fields: Fields, default: int | None) -> int:
    return fields.integer("feed_forward_length", default, high=8 * Limit.HIDDEN)


def _shared_width(fields: Fields, default: int) -> int:
    return fields.integer("expert_shared_feed_forward_length", default, high=8 * Limit.HIDDEN)


def _refuse_unsupported(fields: Fields, family: str) -> None:
    """Refuse ways to weigh and to choose experts that a family is not computed with. CheckpointError."""
    gating = SIGMOID if family in _BY_SIGMOID else 1
    others = [("expert_gating_func", gating)] if family not in _OWN_GATING else []
    if family not in _GROUPED:
        others += [("expert_weights_scale", 1), ("expert_group_count", 1)]
    for key, plain in others:
        if fields.raw(key) not in (None, 0, plain):
            raise fields.error(key, f"is {fields.raw(key)!r}, which is not supported for {family}")
