"""Read what only the small sizes of Gemma 4 have (E2B, E4B): caches that layers share, and inputs of each layer."""

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.model.facts import PerLayerInputs

_SIZE, _VOCAB = 256, 262_144
"""Defaults of transformers."""


def cache_sources(fields: Fields, family: str, sliding: tuple[bool, ...]) -> tuple[int, ...]:
    """Return the layer whose cache each layer reads; empty if all have their own.

    The last layers share: each reads the cache of the last layer of its kind that has one.
    """
    if family != "gemma4" or not (shared := fields.integer("num_kv_shared_layers", 0, low=0, high=Limit.LAYERS)):
        return ()
    if (sources := shared_sources(sliding, shared)) is not None:
        return sources
    own = max(0, len(sliding) - shared)
    kind = next(kind for kind in set(sliding) if kind not in sliding[:own])
    name = "sliding_attention" if kind else "full_attention"
    raise fields.error(
        "num_kv_shared_layers",
        f"is {shared}: of {len(sliding)} layers {own} have caches, none of them with {name}, which later layers have",
    )


def shared_sources(sliding: tuple[bool, ...], shared: int) -> tuple[int, ...] | None:
    """Return the layer whose cache each layer reads, if the last ``shared`` have none; None if a kind has none left."""
    own = max(0, len(sliding) - shared)
    if set(sliding[:own]) != set(sliding):
        return None
    sources = {kind: max(at for at in range(own) if sliding[at] == kind) for kind in set(sliding)}
    return (*range(own), *(sources[sliding[at]] for at in range(own, len(sliding))))


def sharing_width(fields: Fields, family: str) -> int:
    """Return how much wider the feed-forward networks of layers are that share a cache."""
    if family != "gemma4" or not fields.boolean("use_double_wide_mlp", False):
        return 1
    if fields.boolean("enable_moe_block", False) and fields.integer("num_kv_shared_layers", 0, low=0):
        raise fields.error("use_double_wide_mlp", "is true beside enable_moe_block, which is not supported")
    return 2


def per_layer_inputs(fields: Fields, family: str, vocab_size: int) -> PerLayerInputs | None:
    """Return the inputs of each layer. CheckpointError if their table has too few tokens."""
    if family != "gemma4" or not (size := fields.integer("hidden_size_per_layer_input", _SIZE, low=0)):
        return None
    rows = fields.integer("vocab_size_per_layer_input", _VOCAB, high=Limit.VOCAB)
    if rows < vocab_size:
        raise fields.error("vocab_size_per_layer_input", f"is {rows}, less than the {vocab_size} of vocab_size")
    if size > Limit.HIDDEN:
        raise fields.error("hidden_size_per_layer_input", f"is {size}, outside [0, {Limit.HIDDEN}]")
    return PerLayerInputs(rows, size)
