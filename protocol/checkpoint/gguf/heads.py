"""Read the heads of attention of a GGUF file: how many, how large, and how much of them is rotated."""

from dataclasses import dataclass

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.model.facts import HYBRID

_PARTLY_ROTATED = (*HYBRID, "phi3", "glm4_moe", "minimax_m2")
"""Families of which only the first components of a head may be rotated."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of all layers, or of sliding ones if those with full attention have others."""

    num_q: int
    num_kv: int
    head_dim: int
    rotated: int


def gguf_heads(fields: Fields, family: str, hidden: int) -> Heads:
    """Return the heads of a family in which all layers have the same. CheckpointError."""
    num_q = fields.integer("attention.head_count", high=Limit.HEADS)
    num_kv = fields.integer("attention.head_count_kv", num_q, high=Limit.HEADS)
    if num_q % num_kv:
        raise fields.error("attention.head_count_kv", f"is {num_kv}, which does not divide {num_q}")
    head_dim = _head_dim(fields, hidden, num_q)
    return Heads(num_q, num_kv, head_dim, _rotated_size(fields, family, head_dim))


def even_size(fields: Fields, kind: str, default: int | None = None) -> int:
    """Return the size of a head of a kind of layers, of keys and of values. CheckpointError if they differ."""
    key = f"attention.key_length{kind}"
    head_dim = fields.integer(key, default, high=Limit.HEAD_DIM)
    if (other := fields.integer(f"attention.value_length{kind}", head_dim)) != head_dim:
        raise fields.error(
            f"attention.value_length{kind}", f"is {other}, unlike the head size {head_dim}, which is not supported"
        )
    if head_dim % 2:
        raise fields.error(key, f"is {head_dim}; rotary embeddings need an even number")
    return head_dim


def _head_dim(fields: Fields, hidden: int, num_q: int) -> int:
    if not fields.has("attention.key_length") and hidden % num_q:
        raise fields.error("embedding_length", f"is {hidden}, not a multiple of the {num_q} attention heads")
    return even_size(fields, "", hidden // num_q)


def _rotated_size(fields: Fields, family: str, head_dim: int) -> int:
    """Return how many components of a head are rotated."""
    rotated = fields.integer("rope.dimension_count", head_dim)
    if rotated == head_dim or (family in _PARTLY_ROTATED and rotated % 2 == 0 and rotated < head_dim):
        return rotated
    raise fields.error("rope.dimension_count", f"is {rotated}, unlike the head size {head_dim}, which is not supported")
