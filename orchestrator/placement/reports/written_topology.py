"""Write the topology file of a plan: read again, it gives the same layout and the same formats."""

from collections.abc import Iterator
from itertools import groupby

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.cpu_workers import device_name
from mgpu.orchestrator.placement.planner import Plan
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import Stage
from mgpu.protocol.model.quantization import LayerFormats, Quant, WeightFormat, formats_of, weight_format
from mgpu.protocol.model.weight_format import HELD

_EXPERTS = r"(experts\.\d+\.)?"
_PATTERNS = {
    "qkv": r"self_attn\.[qkv]_proj\.weight",
    "q_b": r"self_attn\.q_b_proj\.weight",
    "out": r"self_attn\.o_proj\.weight",
    "gate_up": rf"mlp\.{_EXPERTS}(gate|up)_proj\.weight",
    "down": rf"mlp\.{_EXPERTS}down_proj\.weight",
    "shared_gate_up": r"mlp\.shared_expert\.(gate|up)_proj\.weight",
    "shared_down": r"mlp\.shared_expert\.down_proj\.weight",
}
"""How the file names the matrices of each field of `LayerFormats`."""
_LINEAR_PATTERNS = {
    "qkv": r"linear_attn\.(query|key|value|gate)\.\d+\.weight",
    "out": r"linear_attn\.out_proj\.weight",
}
"""The same of linear attention."""
_LATENT_QKV = r"self_attn\.(q_proj|q_a_proj|kv_a_proj_with_mqa)\.weight"
_ASKED: tuple[Quant, ...] = ("4", "8", "fp8")


def topology_text(plan: Plan, heading: str) -> str:
    """Return the file. ``heading`` is its first line, a comment."""
    if any(stage.shares for stage in plan.layout.placement.stages):
        raise PlacementError("--topology-out: a topology file has no shares; --tp-shares stays an option beside it")
    lines = ["# " + "".join(each if each.isprintable() else "?" for each in heading)]
    stages = [stage for stage in plan.layout.placement.stages if stage.num_layers]
    for stage in stages:
        for first, end, formats in _runs(plan, stage):
            lines.append(f"{first}-{end}:")
            experts = ["experts: cpu"] * (first in plan.layout.cpu_experts)
            lines += [f"  {line}" for line in (_device_line(plan, stage), *_quant_line(plan.facts, formats), *experts)]
    lines += _edges(plan, stages)
    lines += _exceptions(plan)
    return "\n".join(lines) + "\n"


def _device_line(plan: Plan, stage: Stage) -> str:
    return f'device: "{"+".join(device_name(plan.machine, ordinal) for ordinal in stage.devices)}"'


def _runs(plan: Plan, stage: Stage) -> Iterator[tuple[int, int, LayerFormats]]:
    """Yield the ranges of a stage whose layers have equal formats, and experts in the same place."""

    def kind(layer: int) -> tuple[LayerFormats, bool]:
        return formats_of(plan.facts, layer, plan.layout.quant), layer in plan.layout.cpu_experts

    for (formats, _), run in groupby(range(stage.first_layer, stage.end_layer), key=kind):
        layers = list(run)
        yield layers[0], layers[-1] + 1, formats


def _held(facts: ModelFacts) -> list[str]:
    """Return the matrices that the model has."""
    has_shared = facts.experts is not None and facts.experts.shared_width > 0
    has_q_b = facts.latent is not None and facts.latent.query_rank > 0
    absent = ("shared_",) * (not has_shared) + ("q_b",) * (not has_q_b)
    return [held for held in HELD if not held.startswith(absent)]


def _asked(form: WeightFormat) -> Quant | None:
    """Return what quantizes a matrix while it is loaded; None if it stays as the checkpoint has it."""
    if form.quant == "none":
        return "none"
    return next((quant for quant in _ASKED if form == weight_format(quant)), None)


def _usual(facts: ModelFacts, formats: LayerFormats) -> Quant | None:
    """Return what most matrices of a layer are quantized to; None if some stay as the checkpoint has them.

    An entry for the layer would change those too.
    """
    asked = [_asked(getattr(formats, held)) for held in _held(facts)]
    return None if None in asked else max(asked, key=asked.count)


def _quant_line(facts: ModelFacts, formats: LayerFormats) -> list[str]:
    usual = _usual(facts, formats)
    return [] if usual is None or (usual == "none" and not facts.formats) else [f"quant: {usual}"]


def _edges(plan: Plan, stages: list[Stage]) -> Iterator[str]:
    """Yield the embedding and the head, if they have stages of their own."""
    placement = plan.layout.placement
    for tensor, stage, neighbour in (
        ("model.embed_tokens", placement.stages[0], stages[0]),
        ("lm_head", placement.stages[-1], stages[-1]),
    ):
        if stage is not neighbour:
            pattern = tensor.replace(".", r"\.")
            yield f"/^{pattern}\\.weight$/:"
            yield f"  {_device_line(plan, stage)}"


def _exceptions(plan: Plan) -> Iterator[str]:
    """Yield the matrices that have another format than most of their layer, by patterns."""
    facts, found = plan.facts, dict[tuple[str, Quant], list[int]]()
    for layer in range(facts.num_layers if facts.formats else 0):
        formats = formats_of(facts, layer, plan.layout.quant)
        for held in _held(facts):
            asked = _asked(getattr(formats, held))
            if asked is not None and asked != _usual(facts, formats):
                found.setdefault((held, asked), []).append(layer)
    for (held, quant), layers in found.items():
        which = r"\d+" if len(layers) == facts.num_layers else f"({'|'.join(map(str, layers))})"
        pattern = _PATTERNS[held] if facts.experts is not None else _PATTERNS[held].replace(_EXPERTS, "")
        if facts.latent is not None and held == "qkv":
            pattern = _LATENT_QKV
        if facts.linear is not None and held in _LINEAR_PATTERNS:
            pattern = f"({pattern}|{_LINEAR_PATTERNS[held]})"
        yield f"/layers\\.{which}\\.{pattern}/:"
        yield f"  quant: {quant}"
