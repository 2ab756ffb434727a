"""Read the heads of Gemma 4's layers with full attention, which are wider than those of its sliding layers.

Published folders say `global_head_dim` and `num_global_key_value_heads`. Folders that transformers wrote have an object
`per_layer_config` instead, with the sizes of each such layer.
"""

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.model.attention_facts import FullHeads

_NUM_KV, _HEAD_DIM, _GLOBAL_HEAD_DIM, _ROTATED_SHARE = 4, 256, 512, 0.25
"""Defaults of transformers."""


def full_heads(fields: Fields, family: str, num_q_heads: int, sliding: tuple[bool, ...]) -> FullHeads | None:
    """Return the heads of full layers; None for other families. CheckpointError for sizes that cannot be served."""
    if family != "gemma4":
        return None
    keys_are_values = fields.boolean("attention_k_eq_v", False)
    head_dim, num_kv = _sizes(fields, sliding, keys_are_values)
    if head_dim % 2:
        raise fields.error("global_head_dim", f"is {head_dim}; rotary embeddings need an even number")
    if num_q_heads % num_kv:
        raise fields.error(
            "num_global_key_value_heads", f"is {num_kv}, which does not divide {num_q_heads} query heads"
        )
    return FullHeads(num_kv, head_dim, _rotated_size(fields, head_dim), keys_are_values)


def _sizes(fields: Fields, sliding: tuple[bool, ...], keys_are_values: bool) -> tuple[int, int]:
    """Return the size of a head and the number of KV heads of all full layers."""
    base = _head_sizes(fields, (_HEAD_DIM, _NUM_KV))
    if not fields.declares("per_layer_config"):
        num_kv = base[1]
        if keys_are_values:
            num_kv = fields.integer("num_global_key_value_heads", num_kv, high=Limit.HEADS)
        return fields.integer("global_head_dim", _GLOBAL_HEAD_DIM, high=Limit.HEAD_DIM), num_kv
    overrides = fields.nested("per_layer_config") or Fields(fields.source, {})
    unknown = set(overrides.names(Limit.LAYERS)) - set(map(str, range(len(sliding))))
    if unknown:
        raise fields.error("per_layer_config", f"has {min(unknown)[:40]!r}, no number of one of {len(sliding)} layers")
    full: tuple[int, int] | None = None
    for layer, is_sliding in enumerate(sliding):
        own = overrides.nested(str(layer))
        sizes = base if own is None else _head_sizes(own, base)
        expected = base if is_sliding else full or sizes
        if sizes != expected:
            raise fields.error(
                "per_layer_config",
                f"gives layer {layer} {sizes[1]} KV heads of {sizes[0]}, and others of its kind {expected[1]} of "
                f"{expected[0]}; layers of one kind must be alike",
            )
        full = full if is_sliding else sizes
    return full or base


def _head_sizes(fields: Fields, default: tuple[int, int]) -> tuple[int, int]:
    head_dim = fields.integer("head_dim", default[0], high=Limit.HEAD_DIM)
    return head_dim, fields.integer("num_key_value_heads", default[1], high=Limit.HEADS)


def _rotated_size(fields: Fields, head_dim: int) -> int:
    """Return how many components of a full head turn."""
    both = fields.nested("rope_parameters")
    holder = None if both is None else both.nested("full_attention")
    if both is not None and (holder is None or both.nested("sliding_attention") is None):
        raise fields.error("rope_parameters", "must have full_attention and sliding_attention")
    if holder is None:
        return int(_ROTATED_SHARE * head_dim // 2) * 2
    kind = holder.text("rope_type", "default")
    if kind == "default":
        return head_dim
    if kind != "proportional":
        raise holder.error("rope_type", f"is {kind[:40]!r}; supported for gemma4: proportional, default")
    share = holder.number("partial_rotary_factor", 1.0)
    if share > 1 or (size := int(share * head_dim // 2) * 2) < 2:
        raise holder.error(
            "partial_rotary_factor", f"is {share:g}: {head_dim * share:g} of {head_dim} components cannot be rotated"
        )
    return size
