"""Read what only Gemma 4 has: wider heads in layers with full attention, caches that layers share, and their inputs."""

import struct
from pathlib import Path

from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, Limit
from mgpu.protocol.checkpoint.gguf.heads import Heads, even_size
from mgpu.protocol.checkpoint.gguf.tensors import Tensors, rows_in_table
from mgpu.protocol.checkpoint.huggingface.small_gemma import shared_sources
from mgpu.protocol.checkpoint.rope.gguf import ONE_SET, Located
from mgpu.protocol.model.attention_facts import FullHeads
from mgpu.protocol.model.facts import PerLayerInputs

_STILL = 1e29
"""A component whose frequency is divided by more than this is not rotated: files have 1e30."""
_KV = "attention.head_count_kv"
_TABLE = "per_layer_token_embd"


def gemma4_heads(
    fields: Fields, sliding: tuple[bool, ...], located: Located, tensors: Tensors
) -> tuple[Heads, FullHeads]:
    """Return the heads of sliding layers, and those of the others. CheckpointError for sizes that cannot be served."""
    num_q = fields.integer("attention.head_count", high=Limit.HEADS)
    own_kv, full_kv = _kv_heads(fields, sliding, num_q)
    full_dim, own_dim = even_size(fields, ""), even_size(fields, "_swa")
    for key, expected in (("rope.dimension_count_swa", own_dim), ("rope.dimension_count", full_dim)):
        if (found := fields.integer(key, expected)) != expected:
            raise fields.error(key, f"is {found}, unlike the head size {expected}, which is not supported")
    first_full = next((layer for layer, is_sliding in enumerate(sliding) if not is_sliding), None)
    keys_are_values = first_full is not None and f"blk.{first_full}.attn_v.weight" not in tensors
    full = FullHeads(full_kv, full_dim, _rotated_size(located, full_dim), keys_are_values)
    return Heads(num_q, own_kv, own_dim, own_dim), full


def _kv_heads(fields: Fields, sliding: tuple[bool, ...], num_q: int) -> tuple[int, int]:
    """Return the KV heads of sliding layers and of the others: one number, or one of each layer."""
    if not isinstance(fields.raw(_KV), list):
        count = fields.integer(_KV, num_q, high=Limit.HEADS)
        counts = [count] * len(sliding)
    else:
        listed = fields.list_of(_KV, int, len(sliding)) or []
        counts = [int(str(count)) for count in listed]
    found = []
    for kind in (True, False):
        of_kind = {count for count, is_sliding in zip(counts, sliding, strict=True) if is_sliding == kind}
        count = of_kind.pop() if of_kind else counts[0]
        if of_kind:
            raise fields.error(_KV, "differs among layers of one kind, which is not supported")
        if not 1 <= count <= num_q or num_q % count:
            raise fields.error(_KV, f"is {count}, which does not divide {num_q}")
        found.append(count)
    return found[0], found[1]


def _rotated_size(located: Located, head_dim: int) -> int:
    """Return how many components of a full head turn: those pairs whose stored divisor is 1. CheckpointError."""
    if ONE_SET not in located:
        return head_dim
    path, tensor = located[ONE_SET]
    pairs = head_dim // 2
    if tensor.dtype != "F32" or tensor.shape != (pairs,):
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} is {tensor.dtype} {list(tensor.shape)} instead of F32 [{pairs}]"
        )
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        divisors = struct.unpack(f"<{pairs}f", file.read(tensor.nbytes))
    turning = len([divisor for divisor in divisors if divisor == 1.0])
    if turning < 1 or not all(divisor == 1.0 for divisor in divisors[:turning]):
        raise CheckpointError(f"{path}: tensor {tensor.name!r} does not begin with the {turning} ones that it has")
    if not all(divisor > _STILL for divisor in divisors[turning:]):
        raise CheckpointError(f"{path}: tensor {tensor.name!r} has other divisors than 1 and 1e30, which none has here")
    return 2 * turning


def gemma4_sources(fields: Fields, sliding: tuple[bool, ...]) -> tuple[int, ...]:
    """Return the layer whose cache each layer reads; empty if all have their own. CheckpointError."""
    key = "attention.shared_kv_layers"
    shared = fields.integer(key, 0, low=0, high=Limit.LAYERS)
    if shared and (sources := shared_sources(sliding, shared)) is None:
        raise fields.error(key, f"is {shared}: of {len(sliding)} layers none of a kind that later ones have is left")
    return sources if shared and sources is not None else ()


def gemma4_widths(fields: Fields, sources: tuple[int, ...]) -> tuple[int, int]:
    """Return the width of feed-forward networks, and how much wider those of layers are that share a cache."""
    key = "feed_forward_length"
    if not isinstance(fields.raw(key), list):
        return fields.integer(key, high=8 * Limit.HIDDEN), 1
    widths = [int(str(width)) for width in fields.list_of(key, int) or []]
    own = widths[0] if widths else 0
    if not 1 <= own <= 8 * Limit.HIDDEN:
        raise fields.error(key, f"begins with {own}, outside [1, {8 * Limit.HIDDEN}]")
    sharing = [source != layer for layer, source in enumerate(sources)] or [False] * len(widths)
    for factor in (1, 2):
        if widths == [own * (factor if is_sharing else 1) for is_sharing in sharing]:
            return own, factor
    raise fields.error(key, f"has other widths than {own}, and {2 * own} in layers that share a cache")


def gemma4_inputs(fields: Fields, path: Path, tensors: Tensors) -> PerLayerInputs | None:
    """Return the inputs of each layer; None if there are none. CheckpointError if their table has too few tokens."""
    size = fields.integer("embedding_length_per_layer_input", 0, low=0, high=Limit.HIDDEN)
    if not size:
        return None
    rows, needed = (rows_in_table(path, tensors, f"{name}.weight") for name in (_TABLE, "token_embd"))
    if rows < needed:
        raise CheckpointError(f"{path}: tensor '{_TABLE}.weight' has {rows} rows, less than the {needed} tokens")
    return PerLayerInputs(rows, size)
