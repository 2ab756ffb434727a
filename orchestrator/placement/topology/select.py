"""Apply the rules of a topology file to a model: a device for each layer, a format for each matrix. Pure."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.topology.rules import DeviceNames, Rule, Topology
from mgpu.protocol.checkpoint.files.tensors import layer_tensors
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.quantization import LayerFormats, Quant, formats_of, weight_format
from mgpu.protocol.model.weight_format import HELD

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_STACKS: dict[str, tuple[str, ...]] = {
    "qkv": (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_a_proj",
        "self_attn.kv_a_proj_with_mqa",
    ),
    "q_b": ("self_attn.q_b_proj",),
    "out": ("self_attn.o_proj", "linear_attn.out_proj"),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "shared_gate_up": ("shared_expert.gate_proj", "shared_expert.up_proj"),
    "shared_down": ("shared_expert.down_proj",),
}  # fmt: skip
"""Fields of `LayerFormats`, and the matrices that each holds in one stack."""
_LINEAR_PROJECTION = re.compile(r"\.linear_attn\.(query|key|value|gate)\.")
"""One tensor for each head of linear attention, all in one stack."""


@dataclass(frozen=True, slots=True)
class NamedPlaces:
    """Where the rules put things; an empty tuple where no rule says."""

    layers: tuple[DeviceNames, ...]
    embedding: DeviceNames = ()
    head: DeviceNames = ()


def check_rules(topology: Topology, facts: ModelFacts) -> None:
    """Raise PlacementError for layers that the model does not have, and for patterns that no tensor matches."""
    layers = facts.num_layers
    for rule in topology.rules:
        if rule.pattern is None and rule.end_layer > layers:
            raise PlacementError(
                f"{topology.where(rule)}: the model has {layers} layers, 0 to {layers - 1}; the largest range is "
                f"0-{layers}"
            )
        if rule.pattern is not None and not any(rule.pattern.search(name) for name in _all_names(facts)):
            raise PlacementError(
                f"{topology.where(rule)}: no tensor matches. Names are such as {EMBEDDING}, {HEAD} and "
                f"model.layers.{layers - 1}.mlp.down_proj.weight"
            )


def _all_names(facts: ModelFacts) -> Iterator[str]:
    yield from (EMBEDDING, NORM, HEAD)
    for layer in range(facts.num_layers):
        yield from layer_tensors(facts, layer)


def _matches(rule: Rule, name: str) -> bool:
    return rule.pattern is not None and rule.pattern.search(name) is not None


# -- devices -----------------------------------------------------------------------------------------------------------


def named_places(topology: Topology, facts: ModelFacts) -> NamedPlaces:
    """Return where the rules put layers, embedding and head. PlacementError for what cannot be apart."""
    layers: list[DeviceNames] = [()] * facts.num_layers
    for rule in topology.rules:
        if rule.pattern is None and rule.devices:
            layers[rule.first_layer : rule.end_layer] = [rule.devices] * len(rule.layers)
    embedding: DeviceNames = ()
    head: DeviceNames = ()
    for rule in topology.rules:
        if rule.pattern is None or not rule.devices:
            continue
        for layer in _whole_layers(topology, rule, facts):
            layers[layer] = rule.devices
        embedding = rule.devices if _matches(rule, EMBEDDING) else embedding
        if _matches(rule, HEAD):
            head = rule.devices
        elif _matches(rule, NORM):
            raise PlacementError(
                f"{topology.where(rule)}: the final norm goes with the head; write /{HEAD}/ to move both"
            )
    return NamedPlaces(tuple(layers), embedding, head)


def _whole_layers(topology: Topology, rule: Rule, facts: ModelFacts) -> Iterator[int]:
    """Yield the layers whose tensors a rule moves, which must be all of a layer."""
    for layer in range(facts.num_layers):
        names = layer_tensors(facts, layer)
        found = [name for name in names if _matches(rule, name)]
        if len(found) == len(names):
            yield layer
        elif found:
            part = f"{len(found)} of the {len(names)} tensors of layer {layer}"
            raise PlacementError(f"{topology.where(rule)}: matches {part}, {_way_out(rule, facts, layer, found)}")


def _way_out(rule: Rule, facts: ModelFacts, layer: int, found: Sequence[str]) -> str:
    """Return what else than a part of a layer can be elsewhere."""
    where, last = "+".join(rule.devices), facts.num_layers - 1
    if all(".experts." in name for name in found):
        return (
            f"its experts alone. Experts can be on the CPU without their layers: write 0-{facts.num_layers}: "
            f'{{experts: cpu}}. Elsewhere a layer is as a whole, such as {last}: {{device: "{where}"}}'
        )
    return (
        f"such as {found[0]}. A layer is on one device, or split over several: {layer}: {{device: "
        f'"{where}"}} moves all of it. Only embedding and head can be elsewhere'
    )


# -- experts -----------------------------------------------------------------------------------------------------------


def experts_on_cpu(topology: Topology, facts: ModelFacts) -> tuple[int, ...]:
    """Return the layers whose experts are on the CPU. PlacementError if some have none, or are named twice."""
    if not topology.moves_experts:
        return ()
    sparse = [layer for layer in range(facts.num_layers) if facts.experts_of(layer) is not None]
    found: dict[int, Rule] = {}
    for rule in (rule for rule in topology.rules if rule.experts_on_cpu):
        where, last = topology.where(rule), facts.num_layers - 1
        if not sparse:
            raise PlacementError(
                f"{where}: this {facts.architecture} model has no experts. Its last layers can be on the CPU as a "
                f"whole, such as {last}: {{device: cpu}}"
            )
        if facts.borrowed is not None:
            raise PlacementError(
                f"{where}: experts on the CPU are not for transformers' code, which runs this {facts.architecture} "
                f"model; whole layers can be, such as {last}: {{device: cpu}}"
            )
        layers = [layer for layer in rule.layers if layer in sparse]
        if not layers:
            raise PlacementError(f"{where}: no layer of these has experts; layers with experts: {_spans(sparse)}")
        for layer in layers:
            if layer in found:
                raise PlacementError(
                    f"{where}: the experts of layer {layer} are on the CPU already, by line {found[layer].line}"
                )
            found[layer] = rule
    return tuple(sorted(found))


def _spans(layers: Sequence[int]) -> str:
    """Return layers as the ranges that a file has, such as 1-4, 5-8."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer + 1 for layer in layers if layer + 1 not in layers]
    return ", ".join(f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


# -- formats -----------------------------------------------------------------------------------------------------------


def chosen_formats(topology: Topology, facts: ModelFacts, quant: Quant) -> tuple[LayerFormats, ...]:
    """Return the formats of all layers: by the rules, else by ``quant``, else those of the checkpoint."""
    formats = [formats_of(facts, layer, quant) for layer in range(facts.num_layers)]
    for rule in topology.rules:
        if rule.pattern is None and rule.quant is not None:
            for layer in rule.layers:
                formats[layer] = _with(formats[layer], HELD, rule.quant)
    for rule in topology.rules:
        if rule.pattern is not None and rule.quant is not None:
            _apply_pattern(topology, rule, facts, formats, rule.quant)
    return tuple(formats)


def _apply_pattern(
    topology: Topology, rule: Rule, facts: ModelFacts, formats: list[LayerFormats], quant: Quant
) -> None:
    """Change the formats of the matrices that a pattern matches. PlacementError if they are never quantized."""
    has_matrix = False
    for layer in range(facts.num_layers):
        stacks = _stacks_of(facts, layer)
        for held, names in stacks.items():
            found = [name for name in names if _matches(rule, name)]
            if found and len(found) < len(names):
                other = next(name for name in names if name not in found)
                raise PlacementError(
                    f"{topology.where(rule)}: matches {found[0]} and not {other}. mgpu holds them in one matrix, so "
                    f"they have one format; match all {len(names)} of them"
                )
            if found:
                formats[layer], has_matrix = _with(formats[layer], [held], quant), True
    if not has_matrix:
        name = next(name for name in _all_names(facts) if _matches(rule, name))
        raise PlacementError(
            f"{topology.where(rule)}: {name} is never quantized, nor is any other tensor that matches. Linear "
            "layers can be: self_attn.q_proj, k_proj, v_proj and o_proj, mlp.gate_proj, up_proj and down_proj"
        )


def _stacks_of(facts: ModelFacts, layer: int) -> dict[str, list[str]]:
    """Return the weights that each matrix of a layer holds."""
    tensors = layer_tensors(facts, layer)
    names = [name for name in tensors if name.endswith(("_proj.weight", "_proj_with_mqa.weight"))]
    stacks: dict[str, list[str]] = {}
    if projections := [name for name in tensors if _LINEAR_PROJECTION.search(name)]:
        stacks["qkv"] = projections
    for held, kinds in _STACKS.items():
        ends = tuple(f"{kind}.weight" for kind in kinds)
        is_shared = held.startswith("shared_")
        if found := [name for name in names if name.endswith(ends) and (".shared_expert." in name) == is_shared]:
            stacks[held] = found
    return stacks


def _with(formats: LayerFormats, held: Sequence[str], quant: Quant) -> LayerFormats:
    """Return the formats with those of some stacks changed: their matrices are then alike."""
    apart = dict.fromkeys((f"{name}_parts" for name in held if name in ("qkv", "gate_up")), ())
    changed: dict[str, Any] = dict.fromkeys(held, weight_format(quant)) | apart
    return replace(formats, **changed)
