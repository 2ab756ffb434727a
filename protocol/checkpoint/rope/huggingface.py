"""Read rotary embeddings from config.json: theta, and the scaling of its frequencies as transformers computes it."""

from dataclasses import dataclass

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.checkpoint.rope.rules import (
    linear_divisors,
    llama3_divisors,
    longrope_attention,
    yarn_attention,
    yarn_divisors,
)
from mgpu.protocol.model.attention_facts import RopeScaling
from mgpu.protocol.model.facts import HYBRID

_PARTIAL = "partial_rotary_factor"
_DEFAULT_PARTIAL = {**dict.fromkeys(HYBRID, 0.25), "glm4_moe": 0.5}
"""Of families whose configuration does not say."""
_MAY_BE_PARTIAL = ("phi3", "minimax_m2", *_DEFAULT_PARTIAL)
_KINDS = "default, linear, dynamic, llama3, yarn, longrope"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embeddings of a model. ``max_position`` is its context, which yarn stretches."""

    theta: float
    local_theta: float | None
    scaling: RopeScaling | None
    max_position: int


@dataclass(frozen=True, slots=True)
class _Base:
    """What the rules need beside their own parameters."""

    fields: Fields
    theta: float
    size: int
    max_position: int


def rotated_size(fields: Fields, family: str, head_dim: int) -> int:
    """Return how many components of a head are rotated: all, or the first of them. Else CheckpointError."""
    if family == "mistral4":
        return head_dim  # its factor says the same of a head whose other components have no position
    holders = (fields.nested("rope_parameters"), fields.nested("rope_scaling"), fields)
    holder = next((each for each in holders if each is not None and each.has(_PARTIAL)), None)
    default = _DEFAULT_PARTIAL.get(family, 1.0)
    if family == "minimax_m2" and fields.has("rotary_dim"):
        default = fields.integer("rotary_dim", high=Limit.HEAD_DIM) / head_dim
    if (factor := default if holder is None else holder.number(_PARTIAL)) == 1.0:
        return head_dim
    holder, size = holder or fields, int(head_dim * factor)
    if family not in _MAY_BE_PARTIAL:
        raise holder.error(_PARTIAL, f"is not 1, which is not supported for {family}")
    if factor > 1 or size < 2 or size % 2:
        raise holder.error(_PARTIAL, f"is {factor:g}: {head_dim * factor:g} of {head_dim} components cannot be rotated")
    return size


def read_rope(fields: Fields, family: str, default_theta: float, max_position: int, size: int) -> Rope:
    """Read theta, that of sliding layers and the scaling, in the old style or that of transformers 5.

    Old: ``rope_theta`` and ``rope_scaling``. New: ``rope_parameters``, flat or one object per layer type.
    """
    parameters = fields.nested("rope_parameters")
    per_type = parameters is not None and (parameters.has("full_attention") or parameters.has("sliding_attention"))
    full, sliding = parameters, None
    if parameters is not None and per_type:
        full, sliding = parameters.nested("full_attention"), parameters.nested("sliding_attention")
    # transformers lets a `rope_scaling` of the old style win where both are present.
    scaling = fields.nested("rope_scaling") or full
    if family in ("qwen2_5_vl", *HYBRID) and scaling is not None and _kind(scaling) == "mrope":
        scaling = None  # positions of text are the same in all three dimensions
    inside = scaling if scaling is not None and scaling.has("rope_theta") else full
    theta = _theta(inside, fields, "rope_theta", default_theta)
    local = _theta(sliding, fields, "rope_local_base_freq", 1e4)
    _check_sliding(fields, family, sliding, local, theta)
    base = _Base(fields, theta, size, max_position)
    if family == "gemma4":
        return Rope(theta, local, _proportional(full, base), max_position)
    longest = max_position if scaling is None else _stretched(scaling, base)
    if scaling is not None and scaling.has("llama_4_scaling_beta") and family != "mistral4":
        longest = min(longest, _original(scaling, base))  # past it, queries are scaled by their position
    return Rope(theta, local if family == "gemma3" else None, _scaling(scaling, base), longest)


def _theta(holder: Fields | None, fields: Fields, key: str, default: float) -> float:
    if holder is not None and holder.has("rope_theta"):
        return holder.number("rope_theta")
    return fields.number(key, default)


def _check_sliding(fields: Fields, family: str, sliding: Fields | None, local: float, theta: float) -> None:
    """Refuse sliding layers that differ from the others in more than theta, which Gemma 3 and 4 alone may do."""
    if sliding is None:
        return
    if _kind(sliding) != "default":
        raise fields.error("rope_parameters", "scales the sliding-attention layers, which is not supported")
    if family not in ("gemma3", "gemma4") and sliding.has("rope_theta") and local != theta:
        raise fields.error("rope_parameters", f"differ per layer type, which is not supported for {family}")


def _proportional(holder: Fields | None, base: _Base) -> RopeScaling | None:
    """Return the scaling of Gemma 4's full layers, of whose heads a part turns; `full_heads` has checked their kind."""
    factor = 1.0 if holder is None or _kind(holder) == "default" else holder.number("factor", 1.0)
    return None if factor == 1.0 else RopeScaling(linear_divisors(factor, base.size))


def _kind(holder: Fields) -> str:
    kind = holder.text("rope_type", holder.text("type", "default"))
    return "longrope" if kind == "su" else kind  # the name that the first Phi-3 models use


def _scaling(holder: Fields | None, base: _Base) -> RopeScaling | None:
    kind = "default" if holder is None else _kind(holder)
    if holder is None or kind == "default":
        return None
    if kind == "dynamic":
        # It changes nothing up to max_position_embeddings, and longer requests are refused.
        holder.number("factor")
        return None
    if kind == "linear":
        return RopeScaling(linear_divisors(holder.number("factor"), base.size))
    if kind == "llama3":
        return _llama3(holder, base)
    if kind == "yarn":
        return _yarn(holder, base)
    if kind == "longrope":
        return _longrope(holder, base)
    raise holder.error("rope_type", f"is {kind[:40]!r}; supported: {_KINDS}")


def _original(holder: Fields, base: _Base) -> int:
    """Return the context before stretching. As in transformers, that beside the rope object goes first."""
    key = "original_max_position_embeddings"
    own = holder.integer(key, base.max_position, high=Limit.POSITION)
    return base.fields.integer(key, own, high=Limit.POSITION)


def _factor(holder: Fields, base: _Base) -> float:
    """Return the stretching. Without one, it follows from the context before and after."""
    return holder.number("factor", base.max_position / _original(holder, base))


def _stretched(holder: Fields, base: _Base) -> int:
    """Return the context after stretching: config.json of a yarn model may still name the one before."""
    if _kind(holder) != "yarn":
        return base.max_position
    return min(Limit.POSITION, max(base.max_position, round(_original(holder, base) * _factor(holder, base))))


def _llama3(holder: Fields, base: _Base) -> RopeScaling:
    low, high = holder.number("low_freq_factor"), holder.number("high_freq_factor")
    if low >= high:
        raise holder.error("low_freq_factor", f"is {low}, not below high_freq_factor {high}")
    factor, original = holder.number("factor"), _original(holder, base)
    return RopeScaling(llama3_divisors(factor, low, high, original, base.theta, base.size))


def _yarn(holder: Fields, base: _Base) -> RopeScaling:
    if not holder.declares("factor"):
        raise holder.error("factor", "is missing, which yarn needs")
    if base.theta <= 1:
        raise base.fields.error("rope_theta", f"is {base.theta:g}; yarn needs more than 1")
    factor, original = _factor(holder, base), _original(holder, base)
    fast, slow = _optional(holder, "beta_fast", 32.0), _optional(holder, "beta_slow", 1.0)
    divisors = yarn_divisors(factor, original, base.theta, base.size, fast, slow, holder.boolean("truncate", True))
    return RopeScaling(divisors, holder.number("attention_factor", _yarn_attention(holder, factor)))


def _yarn_attention(holder: Fields, factor: float) -> float:
    above, below = _optional(holder, "mscale", 0.0), _optional(holder, "mscale_all_dim", 0.0)
    if above and below:
        return yarn_attention(factor, above) / yarn_attention(factor, below)
    return yarn_attention(factor)


def _optional(holder: Fields, key: str, default: float) -> float:
    """Return a number above 0, or the default where it is absent or 0."""
    return default if not holder.has(key) or holder.raw(key) == 0 else holder.number(key)


def _longrope(holder: Fields, base: _Base) -> RopeScaling:
    original = _original(holder, base)
    attention = longrope_attention(_factor(holder, base), original)
    return RopeScaling(
        holder.numbers("short_factor", base.size // 2),
        holder.number("attention_factor", attention),
        holder.numbers("long_factor", base.size // 2),
        original,
    )
