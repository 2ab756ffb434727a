"""The tensors of a hybrid family's layers: one per head and projection, whatever the checkpoint stacks.

Qwen3-Next stacks queries, keys, values and gates of each key head in turn, Qwen3.5 all queries, then all keys, then all
values. Both stack a query head and the gate of its output. A rank has the rows of its own heads, so each head's rows
are a tensor of their own here: rows of the stored one.

GGUF files of Qwen3.5 have value heads tiled: the first of each key head, then the second of each, and so on. Example:
of 2 key heads with 3 value heads each, heads 0, 1, 2 and 3, 4, 5 are stored as 0, 3, 1, 4, 2, 5.
"""

# G key heads, r value heads that share one, K and V their sizes

import re

from mgpu.protocol.checkpoint.files.tensors import TensorEntry, check_shape, elements_of, join_rows, rows_of
from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.protocol.model.facts import ModelFacts

_STORED_NAMES = (
    (r"self_attn\.q_(proj|gate)\.\d+\.", "self_attn.q_proj."),
    (r"linear_attn\.(query|key|value|gate)\.\d+\.", "linear_attn.in_proj_qkv."),
    (r"linear_attn\.(beta|decay)\.\d+\.", "linear_attn.in_proj_b."),
)
_NEXT_NAMES = {"in_proj_qkv.": "in_proj_qkvz.", "in_proj_b.": "in_proj_ba."}


def hybrid_stored_name(architecture: str, name: str) -> str:
    """Return what checkpoints call the tensor that has this one's rows."""
    for pattern, stored in _STORED_NAMES:
        name = re.sub(pattern, stored, name)
    if architecture == "qwen3_next":
        for short, stacked in _NEXT_NAMES.items():
            name = name.replace(f"linear_attn.{short}", f"linear_attn.{stacked}")
    return name


def hybrid_tensors(facts: ModelFacts, name: str, entry: TensorEntry) -> dict[str, TensorEntry] | None:
    """Return the tensors that a stored one consists of; None if it is none of these. CheckpointError: wrong shape."""
    assert facts.linear is not None, "hybrid families have linear layers"
    if name.endswith(".self_attn.q_proj.weight"):
        size = facts.head_dim
        parts = [(f"{part}.{head}", size) for head in range(facts.num_q_heads) for part in ("q_proj", "q_gate")]
        return _cut(facts, name.removesuffix("q_proj.weight"), entry, parts)
    head, found, last = name.rpartition(".linear_attn.")
    if not found:
        return None
    prefix = head + found
    if last == "conv1d.weight":
        return {name: _channels(facts.linear, entry)}
    if last in ("A_log", "dt_bias") and facts.linear.values_are_tiled:
        check_shape(entry, (facts.linear.value_heads,))
        return {name: elements_of(entry, facts.linear.tiles)}
    parts_of = _stacks(facts.linear).get(last)
    return None if parts_of is None else _cut(facts, prefix, entry, parts_of)


def _channels(linear: LinearFacts, entry: TensorEntry) -> TensorEntry:
    """Return the weights of the convolution, without their dimension of 1."""
    check_shape(entry, (linear.channels(), 1, linear.conv_width))
    entry = rows_of(entry, 0, linear.channels())
    if not linear.values_are_tiled:
        return entry
    first, size = 2 * linear.key_heads * linear.key_dim, linear.value_dim
    values = [rows_of(entry, first + tile * size, size) for tile in linear.tiles]
    return join_rows([rows_of(entry, 0, first), *values])


def _stacks(linear: LinearFacts) -> dict[str, list[tuple[str, int]]]:
    """Return the parts and their rows, in order, of every stored tensor that has several.

    A part that is named more than once has all these rows.
    """
    shared = linear.value_heads // linear.key_heads
    key, value = linear.key_dim, shared * linear.value_dim
    heads = range(linear.key_heads)

    def each(part: str, rows: int) -> list[tuple[str, int]]:
        return [(f"{part}.{head}", rows) for head in heads]

    def of_values(part: str, rows: int) -> list[tuple[str, int]]:
        return each(part, rows // shared) * shared if linear.values_are_tiled else each(part, rows)

    kinds = ("query", key), ("key", key), ("value", value), ("gate", value)
    return {
        "in_proj_qkvz.weight": [(f"{part}.{head}", rows) for head in heads for part, rows in kinds],
        "in_proj_ba.weight": [(f"{part}.{head}", shared) for head in heads for part in ("beta", "decay")],
        "in_proj_qkv.weight": [*each("query", key), *each("key", key), *of_values("value", value)],
        "in_proj_z.weight": of_values("gate", value),
        "in_proj_b.weight": of_values("beta", shared),
        "in_proj_a.weight": of_values("decay", shared),
    }


def _cut(facts: ModelFacts, prefix: str, entry: TensorEntry, parts: list[tuple[str, int]]) -> dict[str, TensorEntry]:
    """Return matrices of so many rows each that lie one after the other."""
    check_shape(entry, (sum(rows for _, rows in parts), facts.hidden_size))
    first, found = 0, dict[str, list[TensorEntry]]()
    for part, rows in parts:
        found.setdefault(f"{prefix}{part}.weight", []).append(rows_of(entry, first, rows))
        first += rows
    return {name: join_rows(pieces) for name, pieces in found.items()}
