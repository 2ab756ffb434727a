"""The experts of families that transformers' code runs: their sizes in config.json, and their tensors.

Which layers have experts, families say in many ways. The stored tensors say it in one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mgpu.protocol.checkpoint.experts import MOST_EXPERTS
from mgpu.protocol.checkpoint.files.tensors import TensorEntry, check_shape
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, Limit
from mgpu.protocol.model.facts import ExpertFacts, ModelFacts


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """What config.json of a family calls the number of experts, of active ones, and the width of one."""

    count: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    active: tuple[str, ...] = ("num_experts_per_tok",)
    width: str = "moe_intermediate_size"


_WIDE = ExpertKeys(width="intermediate_size")
EXPERT_KEYS = {
    "dots1": ExpertKeys(),
    "ernie4_5_moe": ExpertKeys(("moe_num_experts", "num_experts"), ("moe_k", "num_experts_per_tok")),
    "exaone_moe": ExpertKeys(),
    "flex_olmo": _WIDE,
    "glm4_moe": ExpertKeys(),
    "hunyuan_v1_moe": ExpertKeys(active=("moe_topk", "num_experts_per_tok"), width="intermediate_size"),
    "mellum": ExpertKeys(),
    "minimax_m2": _WIDE,
    "olmoe": _WIDE,
    "phimoe": _WIDE,
    "solar_open": ExpertKeys(),
}
"""Borrowed families with experts, by `model_type`."""
_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def borrowed_experts(fields: Fields, kind: str, num_layers: int) -> ExpertFacts | None:
    """Return the experts of a family; None if it has none. Every layer is taken to have some."""
    keys = EXPERT_KEYS.get(kind)
    if keys is None:
        return None
    count_key, active_key = (_first_of(fields, names) for names in (keys.count, keys.active))
    count = fields.integer(count_key, high=MOST_EXPERTS)
    active = fields.integer(active_key, high=MOST_EXPERTS)
    if active > count:
        raise fields.error(active_key, f"is {active}, more than the {count} experts of {count_key}")
    if (name := fields.text("hidden_act", "silu")) not in _ACTIVATIONS:
        raise fields.error("hidden_act", f"is {name[:40]!r}; experts are supported with {', '.join(_ACTIVATIONS)}")
    width = fields.integer(keys.width, high=8 * Limit.HIDDEN)
    return ExpertFacts(count, active, width, (True,) * num_layers, normalizes=True)


def _first_of(fields: Fields, keys: tuple[str, ...]) -> str:
    """Return the first key that is present, or the first of all."""
    return next((key for key in keys if fields.has(key)), keys[0])


def with_stored_experts(source: str, facts: ModelFacts, stored: Mapping[str, TensorEntry]) -> ModelFacts:
    """Return the facts with the layers that have experts. CheckpointError if any is missing or of another shape."""
    experts = facts.experts
    if experts is None:
        return facts
    found: dict[int, set[tuple[int, str]]] = {}
    for name, entry in stored.items():
        if (match := _EXPERT.fullmatch(name)) is None:
            continue
        layer, expert, part = int(match[1]), int(match[2]), match[3]
        if expert >= experts.count:
            raise CheckpointError(f"{source}: tensor {name!r}: the configuration says {experts.count} experts")
        shape = experts.width, facts.hidden_size
        check_shape(entry, shape if part != "down" else shape[::-1])
        found.setdefault(layer, set()).add((expert, part))
    for layer, parts in sorted(found.items()):
        for expert in range(experts.count):
            for part in ("gate", "up", "down"):
                if (expert, part) not in parts:
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                    raise CheckpointError(f"{source}: tensor {name!r} is missing")
    if not found:
        raise CheckpointError(f"{source}: no layer has experts, and the configuration says {experts.count}")
    sparse = tuple(layer in found for layer in range(facts.num_layers))
    return replace(facts, experts=replace(experts, sparse_layers=sparse))
