"""Tensors of a GGUF file under their Hugging Face names, the experts of a layer taken apart.

Example: `blk.3.ffn_gate_exps.weight` [E, F, D] holds a matrix [F, D] of each of E experts, one after the other. They
become `model.layers.3.mlp.experts.0.gate_proj.weight` and so on.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from mgpu.protocol.checkpoint.files.tensors import TensorEntry, check_shape, rows_of
from mgpu.protocol.checkpoint.quantized.gguf import packed_entry
from mgpu.protocol.checkpoint.rope.gguf import Located
from mgpu.protocol.model.facts import ModelFacts

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PECULIAR = {
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
_STACKS = {
    "ffn_gate_exps": ("gate_proj",), "ffn_up_exps": ("up_proj",), "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}  # fmt: skip
_ONE_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")
"""As files of Mixtral were made before experts were stacked."""


def hugging_face_name(family: str, name: str) -> str | None:
    """Translate a GGUF tensor name. None for a tensor outside the layers that is not needed."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    if match := _ONE_EXPERT.fullmatch(name):
        return f"model.layers.{match[1]}.mlp.experts.{match[3]}.{match[2]}_proj.weight"
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] not in ("weight", "bias"):
        return None
    # An unknown part keeps its name, so that `check_tensors` refuses it instead of leaving it out.
    part = (_LAYER_NAMES | _PECULIAR.get(family, {})).get(parts[2], parts[2])
    return f"model.layers.{parts[1]}.{part}{'' if part.endswith('.sinks') else f'.{parts[3]}'}"


def stored_entries(facts: ModelFacts, located: Located) -> dict[str, TensorEntry]:
    """Return the tensors that layers may load. CheckpointError for stacks of experts of wrong shape."""
    entries: dict[str, TensorEntry] = {}
    for file, tensor in located.values():
        entry = TensorEntry(tensor.name, tensor.dtype, tensor.shape, str(file), tensor.offset, tensor.nbytes)
        parts = tensor.name.split(".")
        if len(parts) == 4 and parts[2] in _STACKS and facts.experts is not None:
            found = list(_experts(facts, entry, f"model.layers.{parts[1]}.mlp.experts", parts[2], parts[3]))
        else:
            name = hugging_face_name(facts.architecture, tensor.name)
            found = [] if name is None else [(name, _as_matrix(name, entry))]
        entries |= {name: replace(packed_entry(part), name=name) for name, part in found}
    return entries


def _as_matrix(name: str, entry: TensorEntry) -> TensorEntry:
    """Return the gate of the shared expert as a matrix of one row: converters drop that dimension."""
    is_row = name.endswith("shared_expert_gate.weight") and len(entry.shape) == 1
    return replace(entry, shape=(1, *entry.shape)) if is_row else entry


def _experts(
    facts: ModelFacts, entry: TensorEntry, prefix: str, stack: str, end: str
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the matrices or biases of each expert of a stack."""
    experts = facts.experts
    assert experts is not None
    projections = _STACKS[stack]
    rows, columns = experts.width, facts.hidden_size
    if stack == "ffn_down_exps":
        rows, columns = columns, rows
    total = len(projections) * rows
    check_shape(entry, (experts.count, total) if end == "bias" else (experts.count, total, columns))
    for index in range(experts.count * len(projections)):
        expert, place = divmod(index, len(projections))
        name = f"{prefix}.{expert}.{projections[place]}.{end}"
        if end == "bias":
            size = entry.nbytes // math.prod(entry.shape) * rows
            yield name, replace(entry, shape=(rows,), offset=entry.offset + index * size, nbytes=size)
        else:
            yield name, rows_of(entry, index * rows, rows)
