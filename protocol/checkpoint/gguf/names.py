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
from mgpu.protocol.model.facts import HYBRID, ModelFacts

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
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
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
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
_WHOLE_NAMES = {
    "attn_sinks.weight": "self_attn.sinks",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "layer_output_scale.weight": "layer_scalar",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
}
"""Tensors that have no ending in mgpu."""
_HYBRID = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_PECULIAR: dict[str, dict[str, str]] = {
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma4": {
        "ffn_norm": "pre_feedforward_layernorm",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
    },
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    **dict.fromkeys(HYBRID, _HYBRID),
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
    if not name.startswith("blk."):
        return None
    _, layer, part = (*name.split(".", 2), "", "")[:3]
    head = f"model.layers.{layer}."
    if part in _WHOLE_NAMES:
        return head + _WHOLE_NAMES[part]
    # An unknown part keeps its name, so that `check_tensors` refuses it instead of leaving it out.
    stem, dot, end = part.rpartition(".")
    return head + (_LAYER_NAMES | _PECULIAR.get(family, {})).get(stem, stem) + dot + end


def stored_entries(facts: ModelFacts, located: Located) -> dict[str, TensorEntry]:
    """Return the tensors that layers may load. CheckpointError for stacks of experts of wrong shape."""
    entries: dict[str, TensorEntry] = {}
    for file, tensor in located.values():
        entry = TensorEntry(tensor.name, tensor.dtype, tensor.shape, str(file), tensor.offset, tensor.nbytes)
        parts = tensor.name.split(".")
        is_stack = len(parts) == 4 and parts[2] in _STACKS and parts[3] in ("weight", "bias")
        if is_stack and facts.experts is not None:
            found = list(_experts(facts, entry, f"model.layers.{parts[1]}.mlp.experts", parts[2], parts[3]))
        else:
            name = hugging_face_name(facts.architecture, tensor.name)
            found = [] if name is None else [(name, _as_matrix(facts, name, entry))]
        entries |= {name: replace(packed_entry(part), name=name) for name, part in found}
    return entries


def _as_matrix(facts: ModelFacts, name: str, entry: TensorEntry) -> TensorEntry:
    """Return a tensor with the dimensions that it has in a model folder, or those of a matrix.

    Converters drop dimensions of 1, and stack the projections of heads in latent attention.
    """
    if name.endswith("shared_expert_gate.weight") and len(entry.shape) == 1:
        return replace(entry, shape=(1, *entry.shape))
    if name.endswith("linear_attn.conv1d.weight") and len(entry.shape) == 2:
        return replace(entry, shape=(entry.shape[0], 1, entry.shape[1]))
    if name.endswith((".k_b_proj.weight", ".v_b_proj.weight")) and (latent := facts.latent) is not None:
        is_of_keys = name.endswith(".k_b_proj.weight")
        one = (latent.rank, latent.plain) if is_of_keys else (latent.value_dim, latent.rank)
        check_shape(entry, (facts.num_q_heads, *one))
        return rows_of(entry, 0, facts.num_q_heads * one[0])
    return entry


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
