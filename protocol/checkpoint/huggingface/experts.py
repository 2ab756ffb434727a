"""Read the mixture of experts of a Hugging Face configuration."""

from dataclasses import replace
from typing import Literal

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.model.expert_facts import Clamp, ExpertChoice, ExpertFacts
from mgpu.protocol.model.facts import LATENT

MOST_EXPERTS = Limit.EXPERTS
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
    if family == "minimax_m2":
        return _minimax(fields, num_layers)
    if family in (*LATENT, "glm4_moe"):
        return _deepseek(fields, family, num_layers)
    if family == "llama4":
        return _llama4(fields, num_layers)
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


_DEEPSEEK = {
    "deepseek_v2": (1407, 64, None, 2, 0),
    "deepseek_v3": (2048, 256, 8, 1, 3),
    "mistral4": (2048, 128, 4, 1, 0),
    "glm4_moe": (1408, 128, 8, 1, 1),
}
"""Default width, number, active ones, shared ones, and layers before the first with experts."""


def _deepseek(fields: Fields, family: str, num_layers: int) -> ExpertFacts:
    width, count, active, shared, dense = _DEEPSEEK[family]
    width = fields.integer("moe_intermediate_size", width, high=8 * Limit.HIDDEN)
    count, active = _counts(fields, "n_routed_experts", count, active)
    shared = fields.integer("n_shared_experts", shared, low=0, high=MOST_EXPERTS)
    dense = fields.integer("first_k_dense_replace", dense, low=0, high=Limit.LAYERS)
    if (every := fields.integer("moe_layer_freq", 1)) != 1:
        raise fields.error(
            "moe_layer_freq", f"is {every}; supported: 1, experts in all layers from the first with some"
        )
    return ExpertFacts(
        count,
        active,
        width,
        tuple(layer >= dense for layer in range(num_layers)),
        # transformers never normalizes in version 2, whatever its configuration says.
        normalizes=family != "deepseek_v2" and fields.boolean("norm_topk_prob", True),
        shared_width=shared * width,
        choice=_expert_choice(fields, family, count, active),
    )


_METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}
_DEFAULT_GROUPS = {"deepseek_v2": (None, None), "deepseek_v3": (8, 4), "mistral4": (1, 1), "glm4_moe": (1, 1)}


def _expert_choice(fields: Fields, family: str, count: int, active: int) -> ExpertChoice | None:
    """Return how a router of DeepSeek's kind chooses. CheckpointError for groups that it cannot choose from.

    None: by a softmax over all, as routers of other families do (V2-Lite).
    """
    is_v3 = family in ("deepseek_v3", "glm4_moe")
    expected: Literal["sigmoid", "softmax"] = "sigmoid" if is_v3 else "softmax"
    if (scores := fields.text("scoring_func", expected)) != expected:
        raise fields.error("scoring_func", f"is {scores[:40]!r}; {family} is supported with {expected!r}")
    methods = _METHODS.get(family, ())
    method = fields.text("topk_method", methods[0]) if methods else ""
    if methods and method not in methods:
        raise fields.error("topk_method", f"is {method[:40]!r}; {family} is supported with {', '.join(methods)}")
    scale = fields.number("routed_scaling_factor", 2.5 if family == "deepseek_v3" else 1.0)
    if method == "greedy":
        return None if scale == 1.0 else ExpertChoice(expected, scale=scale)
    groups, kept = _DEFAULT_GROUPS[family]
    groups = fields.integer("n_group", groups, high=MOST_EXPERTS)
    kept = fields.integer("topk_group", kept, high=MOST_EXPERTS)
    best = 1 if family == "deepseek_v2" else 2
    if count % groups:
        raise fields.error("n_group", f"is {groups}, which does not divide the {count} experts of n_routed_experts")
    if kept > groups:
        raise fields.error("topk_group", f"is {kept}, more than the {groups} groups of n_group")
    if count // groups < best:
        raise fields.error("n_group", f"is {groups}: groups of {count // groups} of {count} experts; {best} are needed")
    if active > kept * (count // groups):
        raise fields.error(
            "num_experts_per_tok", f"is {active}, more than the {kept} * {count // groups} experts of topk_group groups"
        )
    return ExpertChoice(expected, groups, kept, best, is_v3, scale)


def _minimax(fields: Fields, num_layers: int) -> ExpertFacts:
    count, active = _counts(fields, _first_of(fields, "num_local_experts", "num_experts"), 256, 8)
    width = fields.integer("intermediate_size", 1536, high=8 * Limit.HIDDEN)
    for key, value in (("scoring_func", "sigmoid"), ("shared_intermediate_size", 0)):
        if fields.has(key) and fields.raw(key) != value:
            raise fields.error(key, f"is {str(fields.raw(key))[:40]!r}; minimax_m2 is supported with {value!r}")
    choice = ExpertChoice("sigmoid", has_correction=True)
    return ExpertFacts(count, active, width, (True,) * num_layers, normalizes=True, choice=choice)


def _llama4(fields: Fields, num_layers: int) -> ExpertFacts | None:
    count, active = _counts(fields, "num_local_experts", 16, 1)
    if active != 1:
        raise fields.error("num_experts_per_tok", f"is {active}; llama4 is supported with 1 of its {count} experts")
    named = fields.list_of("moe_layers", int)
    step = fields.integer("interleave_moe_layer_step", 1)
    layers = range(step - 1, num_layers, step) if named is None else named
    if wrong := set(layers) - set(range(num_layers)):
        raise fields.error("moe_layers", f"names layer {sorted(wrong, key=str)[0]}, and there are {num_layers}")
    if not layers:
        return None
    width = fields.integer("intermediate_size", 8192, high=8 * Limit.HIDDEN)
    return ExpertFacts(
        count, active, width, tuple(layer in layers for layer in range(num_layers)), normalizes=False,
        shared_width=width, choice=ExpertChoice("sigmoid"), weighs_inputs=True,
    )  # fmt: skip


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
