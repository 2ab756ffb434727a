"""The experts of families that transformers' code runs: their sizes in config.json, and their tensors.

Which layers have experts, families say in many ways. The stored tensors say it in one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mgpu.protocol.checkpoint.files.tensors import TensorEntry, check_shape
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, Limit
from mgpu.protocol.checkpoint.huggingface.experts import MOST_EXPERTS
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """What config.json of a family calls the sizes of its experts, and what its modules are called."""

    count: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    active: tuple[str, ...] = ("num_experts_per_tok",)
    width: str = "moe_intermediate_size"
    router: str = "gate"
    shared: str = "shared_experts"
    """The network that all tokens go through beside the experts."""
    shared_count: str = ""
    """How many experts wide that network is; empty: the family has none."""


_WIDE = ExpertKeys(width="intermediate_size")
_SHARING = ExpertKeys(shared_count="n_shared_experts")
EXPERT_KEYS = {
    "dots1": _SHARING,
    "ernie4_5_moe": ExpertKeys(
        ("moe_num_experts", "num_experts"), ("moe_k", "num_experts_per_tok"), shared_count="moe_num_shared_experts"
    ),
    "exaone_moe": ExpertKeys(shared_count="num_shared_experts"),
    "flex_olmo": _WIDE,
    "hunyuan_v1_moe": ExpertKeys(
        active=("moe_topk", "num_experts_per_tok"), width="intermediate_size", router="gate.wg", shared="shared_mlp"
    ),
    "mellum": ExpertKeys(),
    "olmoe": _WIDE,
    "phimoe": ExpertKeys(width="intermediate_size", router="router"),
    "solar_open": _SHARING,
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
    _check_groups(fields, count, active)
    shared = fields.integer(keys.shared_count, 0, low=0, high=MOST_EXPERTS) if keys.shared_count else 0
    shared = 1 if keys.shared == "shared_mlp" else shared  # always there, and as wide as an expert
    return ExpertFacts(count, active, width, (True,) * num_layers, normalizes=True, shared_width=shared * width)


def _check_groups(fields: Fields, count: int, active: int) -> None:
    """Raise CheckpointError for groups of experts that cannot be, or hold fewer experts than a token needs."""
    groups = fields.integer("n_group", 1, high=MOST_EXPERTS)
    chosen = fields.integer("topk_group", 1, high=MOST_EXPERTS)
    if count % groups:
        raise fields.error("n_group", f"is {groups}, which does not divide {count} experts")
    if chosen > groups:
        raise fields.error("topk_group", f"is {chosen}, more than the {groups} groups of n_group")
    if active > chosen * (count // groups):
        raise fields.error(
            "topk_group", f"is {chosen}: so many groups have {chosen * (count // groups)} experts, and a token {active}"
        )


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
    for layer in sorted(found):
        for name, wanted in _beside_experts(facts, experts, layer).items():
            if name not in stored:
                raise CheckpointError(f"{source}: tensor {name!r} is missing")
            check_shape(stored[name], wanted)
    sparse = tuple(layer in found for layer in range(facts.num_layers))
    return replace(facts, experts=replace(experts, sparse_layers=sparse))


def _beside_experts(facts: ModelFacts, experts: ExpertFacts, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the router's tensor of a layer, and those of the network that all tokens go through."""
    keys, hidden = EXPERT_KEYS[facts.architecture], facts.hidden_size
    mlp = f"model.layers.{layer}.mlp"
    shapes: dict[str, tuple[int, ...]] = {f"{mlp}.{keys.router}.weight": (experts.count, hidden)}
    if width := experts.shared_width:
        shapes |= {f"{mlp}.{keys.shared}.{part}_proj.weight": (width, hidden) for part in ("gate", "up")}
        shapes[f"{mlp}.{keys.shared}.down_proj.weight"] = (hidden, width)
    return shapes
