"""Say how the matrices of a quantized checkpoint are held: in which formats, in how many bits, and which are dense."""

import math
from dataclasses import dataclass
from itertools import groupby

from mgpu.orchestrator.placement.planner import Plan
from mgpu.protocol.model.facts import DTYPE_BYTES
from mgpu.protocol.model.quantization import matrices_of
from mgpu.protocol.model.weight_format import DENSE, HELD, WeightFormat

_DENSE = {
    "qkv": "q, k and v", "out": "attention output", "gate_up": "gate and up", "down": "down",
    "shared_gate_up": "the shared expert's gate and up", "shared_down": "the shared expert's down",
    "q_b": "the second projection of queries",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredFormats:
    """The matrices of all layers together, whatever their layout."""

    names: tuple[str, ...]
    bits_per_weight: float
    """With scales, zero points and padding."""
    dense: tuple[str, ...]
    """Kinds of matrices that are held dense, and in how many layers."""


def stored_formats(plan: Plan) -> StoredFormats | None:
    """Return how the checkpoint's formats are held; None if it is not quantized, or quantized anew by ``--quant``."""
    facts = plan.facts
    if not facts.formats or plan.layout.quant != "none":
        return None
    names: dict[str, None] = {}
    dense: dict[str, int] = {}
    weights = nbytes = 0
    for layer, formats in enumerate(facts.formats):
        for matrix, count in matrices_of(facts, 1, layer):
            forms: tuple[WeightFormat, ...] = formats.formats_of(matrix.held)
            weights += count * math.prod(matrix.shape)
            nbytes += count * matrix.nbytes(formats, DTYPE_BYTES[plan.layout.dtype])
            if DENSE in forms:
                dense[_DENSE[matrix.held]] = dense.get(_DENSE[matrix.held], 0) + 1
            else:
                names |= {form.name: None for form in forms}
    listed = tuple(f"{name} in {count} of {facts.num_layers} layers" for name, count in dense.items())
    return StoredFormats(tuple(names), 8 * nbytes / weights, listed)


def is_stored(plan: Plan) -> bool:
    """Return True if some format is that of the checkpoint, False if a topology file asks for all of them."""
    return any(form.source for formats in plan.facts.formats for held in HELD for form in formats.formats_of(held))


def format_ranges(plan: Plan) -> str:
    """Return the formats by layer, such as `0-15 int8, 16-31 dense (down: int4, groups of 32)`."""
    parts, first = [], 0
    for formats, run in groupby(plan.facts.formats):
        end = first + len(list(run))
        names = {held: getattr(formats, held).name or "dense" for held in HELD}
        usual = max(list(names.values())[:4], key=list(names.values())[:4].count)
        others = [f"{_DENSE[held]}: {name}" for held, name in list(names.items())[:4] if name != usual]
        layers = str(first) if end == first + 1 else f"{first}-{end - 1}"
        parts.append(f"{layers} {usual}" + (f" ({'; '.join(others)})" if others else ""))
        first = end
    return ", ".join(parts)


def stored_lines(plan: Plan) -> list[str]:
    """Return the formats in words."""
    stored = stored_formats(plan)
    if stored is None:
        return []
    if not is_stored(plan):
        return [f"formats by layer: {format_ranges(plan)}; {stored.bits_per_weight:.2f} bits per weight of the layers"]
    latent = ("projections of latents (kv_b)",) if plan.facts.latent is not None else ()
    edges = _edges(plan)
    packed = "".join(f"; {name} in {form.name}" for name, form in edges.items() if form != DENSE)
    kept = ", ".join((*(name for name, form in edges.items() if form == DENSE), "norms", *latent, *stored.dense))
    has_scales = not all(name.startswith("GGUF") for name in stored.names)
    return [
        f"checkpoint: layers in {'; '.join(stored.names) or 'no format that is held packed'}: "
        f"{stored.bits_per_weight:.2f} bits per weight{packed}; dense: {kept}"
        + (". Scales of activations, keys and values are not used" if has_scales else "")
    ]


def _edges(plan: Plan) -> dict[str, WeightFormat]:
    """Return the formats of what is outside of the layers."""
    return {"embedding": plan.facts.embedding_format, "head": plan.facts.head_format}


def stored_json(plan: Plan) -> dict[str, object] | None:
    """Return the formats as plain data."""
    stored = stored_formats(plan)
    if stored is None:
        return None
    return {
        "formats": list(stored.names), "bits_per_weight": round(stored.bits_per_weight, 3), "dense": list(stored.dense),
        **{name: form.name or "dense" for name, form in _edges(plan).items()},
    }  # fmt: skip
