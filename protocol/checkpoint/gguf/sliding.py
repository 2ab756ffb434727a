"""Read from a GGUF file which layers have a window, and which have no rotary embedding."""

from mgpu.protocol.checkpoint.files.untrusted import Fields
from mgpu.protocol.checkpoint.gguf.families import GgufFamily

_CHUNK, _PERIOD = 8192, 4
"""Of Llama 4: llama.cpp takes them for granted."""
UNROTATED_PERIOD = {"smollm3": 4, "llama4": _PERIOD}
"""Every so manieth layer has no rotary embedding."""


def gguf_sliding(fields: Fields, family: str, base: GgufFamily, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Return the window and which layers use it; (None, all False) without one. CheckpointError."""
    if family == "llama4":
        return _chunks(fields, num_layers)
    if not base.period or fields.raw("attention.sliding_window") in (None, 0):  # Phi-4 has 0
        return None, (False,) * num_layers
    window = fields.integer("attention.sliding_window")
    pattern = fields.raw("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        flags = fields.list_of("attention.sliding_window_pattern", bool, num_layers)
        return window, tuple(bool(flag) for flag in flags or ())
    period = fields.integer("attention.sliding_window_pattern", base.period)
    return window, tuple((layer + 1) % period != 0 for layer in range(num_layers))


def _chunks(fields: Fields, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Return Llama 4's chunk and which layers use it. A window of 0 says that none does."""
    if fields.raw("attention.sliding_window") == 0:
        return None, (False,) * num_layers
    chunk = fields.integer("attention.chunk_size", _CHUNK)
    return chunk, tuple((layer + 1) % _PERIOD != 0 for layer in range(num_layers))


def unrotated_layers(family: str, num_layers: int, has_window: bool) -> tuple[int, ...]:
    """Return the layers without rotary embedding. Llama 4 has some only where others have chunks."""
    period = UNROTATED_PERIOD.get(family, 0)
    if not period or (family == "llama4" and not has_window):
        return ()
    return tuple(range(period - 1, num_layers, period))
