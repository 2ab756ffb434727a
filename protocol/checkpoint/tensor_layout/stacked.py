"""Map every tensor to the name and the shape that layers load: one tensor per projection, and per expert.

Checkpoints store some projections stacked in one tensor (all experts, gate and up, or q, k and v), and families name
theirs differently. A part of a stacked tensor is a range of bytes in the same file, so it gets an entry of its own and
loaders read it like any other.

Example: a stack `experts.gate_up_proj` [8, 192, 64] in BF16 holds gate and up of 8 experts. Row 0 of `up_proj` of
expert 3 is row 3 * 192 + 96 of the stack, which begins 672 * 64 * 2 bytes after the stack does.
"""

from collections.abc import Mapping
from dataclasses import replace

from mgpu.protocol.checkpoint.files.tensors import TensorEntry, check_shape, rows_of
from mgpu.protocol.checkpoint.tensor_layout.gpt_oss import gpt_oss_tensors
from mgpu.protocol.checkpoint.tensor_layout.hybrid_tensors import hybrid_stored_name, hybrid_tensors
from mgpu.protocol.checkpoint.tensor_layout.llama4 import llama4_tensors
from mgpu.protocol.model.facts import HYBRID, LATENT, ModelFacts

_LAYERS = "model.layers."
_EXPERTS = ".mlp.experts."
_GRANITE = (
    (".block_sparse_moe.router.layer.", ".mlp.gate."),
    (".block_sparse_moe.input_linear.weight", ".mlp.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".mlp.experts.down_proj"),
    (".shared_mlp.input_linear.", ".mlp.shared_expert.gate_up_proj."),
    (".shared_mlp.output_linear.", ".mlp.shared_expert.down_proj."),
)
_MIXTRAL = (
    (".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
)  # fmt: skip
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": _MIXTRAL,
    "minimax_m2": (*_MIXTRAL, (".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias")),
    "phimoe": (*_MIXTRAL, (".mlp.gate.", ".mlp.router.")),
    "ernie4_5_moe": ((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
    "exaone_moe": ((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "gemma4": ((".experts.", ".mlp.experts."), (".router.proj.", ".mlp.gate.")),
    "gpt_oss": ((".mlp.router.", ".mlp.gate."),),
    "llama4": ((".feed_forward.", ".mlp."), (".mlp.router.", ".mlp.gate.")),
    **dict.fromkeys((*LATENT, "glm4_moe"), ((".mlp.shared_experts.", ".mlp.shared_expert."),)),
}  # fmt: skip
"""Parts of stored names, and what stands for them in mgpu, by family."""


def stored_name(architecture: str, name: str) -> str:
    """Return what checkpoints of a family call a tensor, for messages."""
    if architecture in HYBRID:
        name = hybrid_stored_name(architecture, name)
    for stored, own in _RENAMED.get(architecture, ()):
        if name.startswith(_LAYERS):
            name = name.replace(own, stored)
    return name


def separate_tensors(facts: ModelFacts, stored: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return entries under mgpu's names, with stacks taken apart. CheckpointError for a stack of wrong shape."""
    return taken_apart(facts, {_own_name(facts.architecture, name): entry for name, entry in stored.items()})


def taken_apart(facts: ModelFacts, named: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return entries, which have mgpu's names, with stacks taken apart. CheckpointError for a stack of wrong shape."""
    tensors: dict[str, TensorEntry] = {}
    for name, entry in named.items():
        parts = _parts(facts, name, entry, named) if name.startswith(_LAYERS) else None
        for part, piece in ({name: entry} if parts is None else parts).items():
            tensors[part] = replace(piece, name=part)
    return tensors


def borrowed_tensors(facts: ModelFacts, stored: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return entries under the names of transformers' modules, but each expert's matrices as separate tensors."""
    tensors: dict[str, TensorEntry] = {}
    for name, entry in stored.items():
        own = _own_name(facts.architecture, name)
        head, _, last = own.rpartition(_EXPERTS)
        is_stack = facts.experts is not None and head.startswith(_LAYERS) and last in ("gate_up_proj", "down_proj")
        parts = _experts(facts, entry, f"{head}.mlp.experts", last) if is_stack else {own: entry}
        tensors |= {part: replace(piece, name=part) for part, piece in parts.items()}
    return tensors


def _own_name(architecture: str, name: str) -> str:
    for stored, own in _RENAMED.get(architecture, ()):
        if name.startswith(_LAYERS):
            name = name.replace(stored, own)
    return name


def _parts(
    facts: ModelFacts, name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry] | None:
    """Return the tensors that a stacked one consists of; None if it is not stacked."""
    if facts.architecture == "gpt_oss" and _EXPERTS in name:
        return gpt_oss_tensors(facts, name, entry, tensors)
    if facts.architecture == "llama4" and _EXPERTS in name:
        return llama4_tensors(facts, name, entry)
    if facts.linear is not None and (parts := hybrid_tensors(facts, name, entry)) is not None:
        return parts
    head, _, last = name.rpartition(".mlp.experts.")
    if facts.experts is not None and last in ("gate_up_proj", "down_proj"):
        return _experts(facts, entry, f"{head}.mlp.experts", last)
    if name.endswith(".self_attn.qkv_proj.weight"):
        sizes = facts.num_q_heads * facts.head_dim, *2 * (facts.num_kv_heads * facts.head_dim,)
        return _stack(facts, entry, name, "qkv_proj", dict(zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True)))
    for end, width in (("mlp.gate_up_proj.weight", facts.intermediate_size), _shared(facts)):
        if end and name.endswith(end):
            return _stack(facts, entry, name, "gate_up_proj", {"gate_proj": width, "up_proj": width})
    return None


def _shared(facts: ModelFacts) -> tuple[str, int]:
    width = facts.experts.shared_width if facts.experts is not None else 0
    return "mlp.shared_expert.gate_up_proj.weight" if width else "", width


def _stack(
    facts: ModelFacts, entry: TensorEntry, name: str, stacked: str, parts: Mapping[str, int]
) -> dict[str, TensorEntry]:
    """Return matrices of so many rows each that lie one after the other."""
    check_shape(entry, (sum(parts.values()), facts.hidden_size))
    first, found = 0, {}
    for part, rows in parts.items():
        found[name.replace(stacked, part)] = rows_of(entry, first, rows)
        first += rows
    return found


def _experts(facts: ModelFacts, entry: TensorEntry, prefix: str, last: str) -> dict[str, TensorEntry]:
    experts = facts.experts
    assert experts is not None
    projections = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    rows, columns = experts.width, facts.hidden_size
    if last == "down_proj":
        rows, columns = columns, rows
    count = len(projections)
    check_shape(entry, (experts.count, count * rows, columns))
    return {
        f"{prefix}.{expert}.{projection}.weight": rows_of(entry, (expert * count + index) * rows, rows)
        for expert in range(experts.count)
        for index, projection in enumerate(projections)
    }
