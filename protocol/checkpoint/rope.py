"""Read rotary-embedding parameters from config.json, in the old style and that of transformers 5."""

from dataclasses import dataclass

from mgpu.protocol.checkpoint.untrusted import Fields
from mgpu.protocol.model.facts import RopeScaling


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    local_theta: float | None
    scaling: RopeScaling | None


def read_rope(fields: Fields, family: str, max_position: int) -> Rope:
    """Read ``rope_theta`` + ``rope_scaling``, or ``rope_parameters`` (flat, or one object per layer type)."""
    parameters = fields.nested("rope_parameters")
    per_type = parameters is not None and (parameters.has("full_attention") or parameters.has("sliding_attention"))
    full, sliding = parameters, None
    if parameters is not None and per_type:
        full, sliding = parameters.nested("full_attention"), parameters.nested("sliding_attention")
    # transformers lets a `rope_scaling` of the old style win where both are present.
    scaling = fields.nested("rope_scaling") or full
    theta = _theta(full, fields, "rope_theta", 1e6 if family == "gemma3" else 1e4)
    local = _theta(sliding, fields, "rope_local_base_freq", 1e4)
    _check_sliding(fields, family, sliding, local, theta)
    for holder in (fields, full, sliding):
        if holder is not None and holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.error("partial_rotary_factor", "is not 1, which is not supported")
    return Rope(theta, local if family == "gemma3" else None, _scaling(scaling, fields, max_position))


def _theta(holder: Fields | None, fields: Fields, key: str, default: float) -> float:
    if holder is not None and holder.has("rope_theta"):
        return holder.number("rope_theta")
    return fields.number(key, default)


def _check_sliding(fields: Fields, family: str, sliding: Fields | None, local: float, theta: float) -> None:
    """Sliding layers may differ from the others in theta only, and only for Gemma 3."""
    if sliding is None:
        return
    if _kind(sliding) != "default":
        raise fields.error("rope_parameters", "scales the sliding-attention layers, which is not supported")
    if family != "gemma3" and sliding.has("rope_theta") and local != theta:
        raise fields.error("rope_parameters", f"differ per layer type, which is not supported for {family}")


def _kind(holder: Fields) -> str:
    return holder.text("rope_type", holder.text("type", "default"))


def _scaling(holder: Fields | None, fields: Fields, max_position: int) -> RopeScaling | None:
    if holder is None or (kind := _kind(holder)) == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", holder.number("factor"))
    if kind == "llama3":
        original = fields.integer("original_max_position_embeddings", max_position)
        low, high = holder.number("low_freq_factor"), holder.number("high_freq_factor")
        if low >= high:
            raise holder.error("low_freq_factor", f"is {low}, not below high_freq_factor {high}")
        return RopeScaling(
            "llama3",
            holder.number("factor"),
            low,
            high,
            holder.integer("original_max_position_embeddings", original),
        )
    raise holder.error("rope_type", f"is {kind[:40]!r}; supported: default, linear, llama3")
