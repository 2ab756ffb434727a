"""Read from config.json which layers see a window of the context only."""

from mgpu.protocol.checkpoint.files.untrusted import Fields
from mgpu.protocol.model.facts import HYBRID, LATENT

_EVERYWHERE = ("mistral", "mixtral", "qwen3_moe", "phi3", "ministral3")
"""Families whose layers all slide if one does."""
_NOWHERE = ("llama", "granite", "granitemoe", "granitemoeshared", "olmo2", "glm4_moe", "minimax_m2", *HYBRID, *LATENT)
_IF_GIVEN = ("mixtral", "phi3", "smollm3", "ministral3")
"""Families without a window by default."""
_IF_ASKED = ("qwen2", "qwen2_moe", "qwen2_5_vl", "qwen3", "qwen3_moe", "smollm3")
"""Families whose window counts only with `use_sliding_window`."""
_DEFAULT_WINDOW = {"gpt_oss": 128, "gemma4": 512}
_PERIODS = {"gemma2": 2, "gpt_oss": 2, "olmo3": 4, "gemma4": 6}
"""Every so manieth layer sees everything."""


def read_sliding(fields: Fields, family: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Return the window and which layers use it; (None, all False) without one."""
    if family == "llama4":
        return _read_chunks(fields, num_layers)
    if not _has_window(fields, family):
        return None, (False,) * num_layers
    window = fields.integer("sliding_window", _DEFAULT_WINDOW.get(family, 4096))
    types = fields.list_of("layer_types", str, num_layers) if family not in _EVERYWHERE else None
    if types is not None:
        sliding = tuple(_is_sliding(fields, kind) for kind in types)
    else:
        sliding = tuple(_slides(fields, family, layer) for layer in range(num_layers))
    if family == "gemma4":
        sliding = (*sliding[:-1], False)  # whatever the configuration says of the last layer
    return window, sliding


def _read_chunks(fields: Fields, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Return Llama 4's chunk and which layers use it: those with rotary embedding, if no kinds are named."""
    if fields.declares("attention_chunk_size") and not fields.has("attention_chunk_size"):
        return None, (False,) * num_layers
    chunk = fields.integer("attention_chunk_size", 8192)
    kinds = fields.list_of("layer_types", str, num_layers)
    if kinds is None:
        return chunk, tuple(layer not in unrotated_layers(fields, num_layers) for layer in range(num_layers))
    for kind in kinds:
        if kind not in ("chunked_attention", "full_attention"):
            raise fields.error("layer_types", f"has {str(kind)[:40]!r}; supported: chunked_attention, full_attention")
    return chunk, tuple(kind == "chunked_attention" for kind in kinds)


def unrotated_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Return SmolLM3's and Llama 4's layers without rotary embedding.

    The key names those with one, in spite of what it is called.
    """
    rotated = fields.list_of("no_rope_layers", int, num_layers)
    if not rotated:
        interval = fields.integer("no_rope_layer_interval", 4)
        rotated = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    return tuple(layer for layer, is_rotated in enumerate(rotated) if not is_rotated)


def _has_window(fields: Fields, family: str) -> bool:
    if family in _NOWHERE or (family in _IF_GIVEN and not fields.has("sliding_window")):
        return False
    if fields.declares("sliding_window") and not fields.has("sliding_window"):
        if family == "gemma4":
            raise fields.error("sliding_window", "is null; gemma4 needs a number of tokens")
        return False
    return family not in _IF_ASKED or fields.boolean("use_sliding_window", False)


def _slides(fields: Fields, family: str, layer: int) -> bool:
    """Return what a family does with a layer where the configuration has no `layer_types`."""
    if family in _EVERYWHERE or family == "ministral":
        return True
    if family in _PERIODS or family == "gemma3":
        period = _PERIODS.get(family) or fields.integer("sliding_window_pattern", 6)
        return (layer + 1) % period != 0
    if family == "qwen2_moe":
        return layer % 2 == 0 and layer < fields.integer("max_window_layers", 28, low=0)
    return layer >= fields.integer("max_window_layers", 80 if family == "qwen2_5_vl" else 28, low=0)


def _is_sliding(fields: Fields, kind: object) -> bool:
    if kind not in ("sliding_attention", "full_attention"):
        raise fields.error("layer_types", f"has {str(kind)[:40]!r}; supported: sliding_attention, full_attention")
    return kind == "sliding_attention"
