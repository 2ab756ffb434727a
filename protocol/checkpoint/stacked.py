"""Give every tensor the name and the shape that layers load: one tensor per projection, and per expert.

Checkpoints store some projections stacked in one tensor (all experts, or gate and up), and families name theirs
differently. A part of a stacked tensor is a range of bytes in the same file, so it gets an entry of its own and loaders
read it like any other.

Example: a stack `experts.gate_up_proj` [8, 192, 64] in BF16 holds gate and up of 8 experts. Row 0 of `up_proj` of
expert 3 is row 3 * 192 + 96 of the stack, which begins 672 * 64 * 2 bytes after the stack does.
"""

import math
from dataclasses import replace

from mgpu.protocol.checkpoint.tensors import TensorEntry
from mgpu.protocol.checkpoint.untrusted import CheckpointError
from mgpu.protocol.model.facts import ExpertFacts, ModelFacts

_LAYERS = "model.layers."
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": ((".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w2.", ".down_proj."),
                (".w3.", ".up_proj.")),
}  # fmt: skip
"""Parts of stored names, and what stands for them in mgpu, by family."""


def stored_name(architecture: str, name: str) -> str:
    """Return what checkpoints of a family call a tensor, for messages."""
    for stored, own in _RENAMED.get(architecture, ()):
        if name.startswith(_LAYERS):
            name = name.replace(own, stored)
    return name


def separate_tensors(facts: ModelFacts, stored: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return entries under mgpu's names, with stacks taken apart. CheckpointError for a stack of wrong shape."""
    tensors: dict[str, TensorEntry] = {}
    for name, entry in stored.items():
        own = _own_name(facts.architecture, name)
        parts = _parts(facts, own, entry) or {own: entry}
        tensors |= {part: replace(piece, name=part) for part, piece in parts.items()}
    return tensors


def _own_name(architecture: str, name: str) -> str:
    for stored, own in _RENAMED.get(architecture, ()):
        if name.startswith(_LAYERS):
            name = name.replace(stored, own)
    return name


def _parts(facts: ModelFacts, name: str, entry: TensorEntry) -> dict[str, TensorEntry]:
    """Return the tensors that a stacked one consists of; none if it is not stacked."""
    if not name.startswith(_LAYERS) or facts.experts is None:
        return {}
    head, _, last = name.rpartition(".mlp.experts.")
    if last == "gate_up_proj":
        return _experts(facts, facts.experts, entry, f"{head}.mlp.experts", ("gate_proj", "up_proj"))
    if last == "down_proj":
        return _experts(facts, facts.experts, entry, f"{head}.mlp.experts", ("down_proj",))
    return {}


def _experts(
    facts: ModelFacts, experts: ExpertFacts, entry: TensorEntry, prefix: str, projections: tuple[str, ...]
) -> dict[str, TensorEntry]:
    rows, columns = experts.width, facts.hidden_size
    if projections == ("down_proj",):
        rows, columns = columns, rows
    count = len(projections)
    _check_shape(entry, (experts.count, count * rows, columns))
    return {
        f"{prefix}.{expert}.{projection}.weight": _matrix(entry, (expert * count + index) * rows, rows)
        for expert in range(experts.count)
        for index, projection in enumerate(projections)
    }


def _matrix(entry: TensorEntry, first_row: int, rows: int) -> TensorEntry:
    """Return some rows of a stored tensor, all of whose dimensions but the last count as rows, as a matrix."""
    row_bytes = entry.nbytes // math.prod(entry.shape[:-1])
    shape, offset = (rows, entry.shape[-1]), entry.offset + first_row * row_bytes
    return replace(entry, shape=shape, offset=offset, nbytes=rows * row_bytes)


def _check_shape(entry: TensorEntry, expected: tuple[int, ...]) -> None:
    if entry.shape != expected:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, the configuration asks for "
            f"{list(expected)}"
        )
