"""Read the scaling of rotary frequencies from a GGUF file, by llama.cpp's rules.

llama.cpp combines two things: a rule that the metadata name (linear or yarn), and divisors that are stored as a tensor
(Llama 3.1's, or two sets of LongRoPE). Both may be there.
"""

import math
import struct
from pathlib import Path

from mgpu.protocol.checkpoint.files.gguf_file import GgufTensor
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, Limit
from mgpu.protocol.checkpoint.rope.rules import linear_divisors, yarn_attention, yarn_divisors
from mgpu.protocol.model.attention_facts import RopeScaling
from mgpu.protocol.model.facts import LATENT

ONE_SET, SHORT_SET, LONG_SET = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_KINDS = ("none", "linear", "yarn", "longrope")
Located = dict[str, tuple[Path, GgufTensor]]


def read_gguf_rope(
    fields: Fields, located: Located, family: str, theta: float, size: int
) -> tuple[RopeScaling | None, int]:
    """Return the scaling and the context of a model; ``size`` components of a head are rotated.

    CheckpointError when it cannot be computed.
    """
    context = fields.integer("context_length", 4096, high=Limit.POSITION)
    kind = fields.text("rope.scaling.type", "linear")
    if kind not in _KINDS:
        raise fields.error("rope.scaling.type", f"is {kind[:40]!r}; supported: {', '.join(_KINDS)}")
    factor = 1.0 if kind == "none" else _factor(fields)
    original = fields.integer("rope.scaling.original_context_length", context, high=Limit.POSITION)
    rule, attention = linear_divisors(factor, size), fields.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        rule = _yarn(fields, factor, original, theta, size, truncate=family != "gpt_oss")
        attention *= _yarn_attention(fields, family, factor)
        context = min(Limit.POSITION, max(context, round(original * factor)))
    if fields.raw("attention.temperature_scale") and family not in LATENT:
        context = min(context, original)  # past it, queries are scaled by their position
    stored, stored_long = _stored_sets(located, size)
    divisors, long_divisors = _product(rule, stored), _product(rule, stored_long) if stored_long else ()
    if not long_divisors and attention == 1.0 and all(divisor == 1.0 for divisor in divisors):
        return None, context
    return RopeScaling(divisors, attention, long_divisors, original if long_divisors else 0), context


def _factor(fields: Fields) -> float:
    """Return by how much positions are divided. llama.cpp: 0 means not at all, and no type means linear."""
    key = "rope.scaling.factor" if fields.has("rope.scaling.factor") else "rope.scale_linear"
    return 1.0 if fields.raw(key) == 0 else fields.number(key, 1.0)


def _yarn(
    fields: Fields, factor: float, original: int, theta: float, size: int, *, truncate: bool
) -> tuple[float, ...]:
    """Return yarn's divisors. ``truncate``: the range between fast and slow ones is widened to whole indexes."""
    if theta <= 1:
        raise fields.error("rope.freq_base", f"is {theta:g}; yarn needs more than 1")
    if fields.raw("rope.scaling.yarn_ext_factor") not in (None, 1.0, -1.0):
        raise fields.error("rope.scaling.yarn_ext_factor", "is not 1, which is not supported")
    fast = fields.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = fields.number("rope.scaling.yarn_beta_slow", 1.0)
    return yarn_divisors(factor, original, theta, size, fast, slow, truncate)


def _yarn_attention(fields: Fields, family: str, factor: float) -> float:
    """Return the factor on cos and sin. With latent attention the multiplier is for query-key products instead."""
    if fields.raw("rope.scaling.yarn_log_multiplier") in (None, 0):
        return yarn_attention(factor)
    if family in LATENT:
        return 1.0
    return yarn_attention(factor) / yarn_attention(factor, fields.number("rope.scaling.yarn_log_multiplier"))


def _stored_sets(located: Located, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the stored divisors, and those of long contexts; empty without any. One set for all goes first."""
    if ONE_SET in located:
        return _stored(*located[ONE_SET], size), ()
    pair = SHORT_SET in located, LONG_SET in located
    if not any(pair):
        return (), ()
    if not all(pair):
        there, absent = (SHORT_SET, LONG_SET) if pair[0] else (LONG_SET, SHORT_SET)
        raise CheckpointError(f"{located[there][0]}: tensor {there!r} is there without {absent!r}")
    return _stored(*located[SHORT_SET], size), _stored(*located[LONG_SET], size)


def _stored(path: Path, tensor: GgufTensor, size: int) -> tuple[float, ...]:
    if tensor.dtype != "F32" or tensor.shape != (size // 2,):
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} is {tensor.dtype} {list(tensor.shape)} instead of F32 [{size // 2}]"
        )
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        values = struct.unpack(f"<{size // 2}f", file.read(tensor.nbytes))
    wrong = [value for value in values if not 0 < value <= 1e30 or not math.isfinite(value)]
    if wrong:
        raise CheckpointError(f"{path}: tensor {tensor.name!r} has {wrong[0]:g}, expected finite numbers above 0")
    return values


def _product(rule: tuple[float, ...], stored: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(one * other for one, other in zip(rule, stored, strict=True)) if stored else rule
