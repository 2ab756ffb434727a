"""GGUF files of newer architectures, converted from random models of transformers as llama.cpp's converter does it.

Names of tensors are those of the gguf package. What is done to them is in `_changed`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from gguf.constants import MODEL_ARCH_NAMES
from torch import Tensor

from harness.models.model_files import GgufValue, bool_array, f32, int_array, string, string_array, u32
from harness.models.odd_gguf import Parts
from harness.models.odd_models import make_model

_ARCHITECTURES = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
_HYBRID = ("qwen3next", "qwen35", "qwen35moe")
_FUSED = ("gemma4", "mistral4", "qwen35moe")
"""Architectures whose gate and up matrices of experts are written as one stack."""
Metadata = dict[str, GgufValue]


@dataclass(frozen=True)
class Converted:
    """A tiny model, fields of its configuration, and keys that are set in the file."""

    family: str
    architecture: str
    fields: dict[str, object] = field(default_factory=dict)
    change: Callable[[Parts], None] = lambda parts: None


@torch.inference_mode()
def convert(case: Converted) -> tuple[Any, Parts]:
    """Return the model and the parts of its file, all numbers in F32."""
    model = make_model(case.family, **case.fields)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(-1.0, 1.0)
    for name, number in model.named_buffers():
        if name.endswith(("layer_scalar", "e_score_correction_bias")):
            number.uniform_(0.5, 1.5)
    config, architecture = model.config, case.architecture
    config.allow_global_per_layer_attribute_access = True
    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], config.num_hidden_layers)
    tensors = {}
    for name, values in _stored(model):
        for own, changed in _changed(name, values, config, architecture):
            stored = own if own.startswith(("blk.", "rope")) else names.get_name(own, (".weight", ".bias", ".scale"))
            assert stored is not None, f"the gguf package knows no {own}"
            tensors[stored] = tuple(changed.shape), 0, changed.contiguous().numpy().astype("<f4").tobytes()
    parts = Parts(architecture, _metadata(config, architecture), tensors)
    case.change(parts)
    return model, parts


def _stored(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        is_saved = name in model.state_dict() and not (name == "lm_head.weight" and model.config.tie_word_embeddings)
        if is_saved and not name.endswith(("inv_freq", "embed_scale")):
            yield name, values
    if model.config.model_type == "gemma4_text":
        size = _full_heads(model.config)["head_dim"]
        turning = round(size * model.config.rope_parameters["full_attention"].get("partial_rotary_factor", 1.0) / 2)
        yield "rope_freqs.weight", torch.tensor([1.0] * turning + [1e30] * (size // 2 - turning))


def _changed(name: str, values: Tensor, config: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that one of the model becomes; those that are not named blk. have transformers' names."""
    head = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
    if ".experts." in name:
        yield from _experts(head, name.rsplit(".", 1)[1], values, config, architecture)
    elif ".linear_attn." in name:
        yield from _linear(name, head, values, config, architecture)
    elif name.endswith("kv_b_proj.weight"):
        heads = values.view(config.num_attention_heads, -1, values.shape[-1])
        keys, vectors = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield head + "attn_k_b.weight", keys.transpose(1, 2)
        yield head + "attn_v_b.weight", vectors
    elif name.endswith("e_score_correction_bias"):
        yield head + "exp_probs_b.bias", values
    elif name.endswith("router.per_expert_scale"):
        yield head + "ffn_down_exps.scale", values
    elif name.endswith("router.scale"):
        yield head + "ffn_gate_inp.scale", values
    elif name.endswith("layer_scalar"):
        yield head + "layer_output_scale.weight", values
    elif name.endswith("shared_expert_gate.weight"):
        yield head + "ffn_gate_inp_shexp.weight", values.squeeze()
    elif name.endswith("norm.weight") and architecture in _HYBRID:
        yield name, values + 1
    elif architecture == "mistral3" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = values.shape[0] // config.head_dim
        yield name, values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    else:
        yield name, values


def _experts(head: str, last: str, values: Tensor, config: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the stacks of experts. Llama 4's are transposed in the model."""
    values = values.transpose(1, 2) if architecture == "llama4" else values
    if last == "down_proj":
        yield head + "ffn_down_exps.weight", values
    elif architecture in _FUSED:
        yield head + "ffn_gate_up_exps.weight", values
    else:
        gate, up = values.chunk(2, dim=1)
        yield head + "ffn_gate_exps.weight", gate
        yield head + "ffn_up_exps.weight", up


def _linear(name: str, head: str, values: Tensor, config: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of linear attention; Qwen3.5's value heads are tiled, Qwen3-Next's rows brought together."""
    last = name.split(".linear_attn.")[1]
    keys, values_per_key = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim

    def tiled(rows: Tensor, size: int) -> Tensor:
        if architecture == "qwen3next":
            return rows
        return rows.reshape(keys, values_per_key, size, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    def tiled_after_keys(rows: Tensor) -> Tensor:
        first = 2 * keys * key_dim
        return torch.cat((rows[:first], tiled(rows[first:], value_dim)))

    if last == "in_proj_qkvz.weight":
        of_heads = values.view(keys, -1, values.shape[1])
        sizes = [key_dim, key_dim, values_per_key * value_dim, values_per_key * value_dim]
        q, k, v, z = (part.reshape(-1, values.shape[1]) for part in of_heads.split(sizes, dim=1))
        yield head + "attn_qkv.weight", torch.cat((q, k, v))
        yield head + "attn_gate.weight", z
    elif last == "in_proj_qkv.weight":
        yield name, tiled_after_keys(values)
    elif last == "conv1d.weight":
        yield name, tiled_after_keys(values.squeeze(1))
    elif last == "in_proj_z.weight":
        yield name, tiled(values, value_dim)
    elif last in ("in_proj_a.weight", "in_proj_b.weight"):
        yield name, tiled(values, 1)
    elif last == "A_log":
        yield head + "ssm_a", tiled(-values.exp(), 1)
    elif last == "dt_bias":
        yield head + "ssm_dt.bias", tiled(values, 1)
    elif last == "out_proj.weight":
        yield name, tiled(values.T, value_dim).T
    else:
        yield name, values


def _metadata(config: Any, architecture: str) -> Metadata:
    values: Metadata = {
        "block_count": u32(config.num_hidden_layers), "embedding_length": u32(config.hidden_size),
        "feed_forward_length": u32(config.intermediate_size), "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": u32(config.num_key_value_heads), "context_length": u32(256),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
    }  # fmt: skip
    rope = config.rope_parameters
    if architecture != "gemma4":
        values["rope.freq_base"] = f32(rope["rope_theta"])
        if size := getattr(config, "head_dim", None):
            values |= {"attention.key_length": u32(size), "attention.value_length": u32(size)}
            values["rope.dimension_count"] = u32(int(size * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "yarn":
        original = u32(rope["original_max_position_embeddings"])
        values |= {"rope.scaling.type": string("yarn"), "rope.scaling.factor": f32(rope["factor"]),
                   "rope.scaling.original_context_length": original}  # fmt: skip
    values |= _experts_metadata(config, architecture) | _MORE.get(architecture, lambda config: {})(config)
    top = {"general.architecture": string(architecture), "tokenizer.ggml.model": string("gpt2"),
           "tokenizer.ggml.tokens": string_array([f"t{number}" for number in range(config.vocab_size)])}  # fmt: skip
    return top | {f"{architecture}.{key}": value for key, value in values.items()}


def _experts_metadata(config: Any, architecture: str) -> Metadata:
    names = "num_local_experts", "num_experts", "n_routed_experts"
    count = next((each for name in names if (each := getattr(config, name, None))), None)
    if count is None or getattr(config, "enable_moe_block", True) is False:
        return {}
    active = getattr(config, "top_k_experts", None) or config.num_experts_per_tok
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    values: Metadata = {
        "expert_count": u32(count), "expert_used_count": u32(active), "expert_feed_forward_length": u32(width)
    }  # fmt: skip
    if architecture in _HYBRID and (shared := getattr(config, "shared_expert_intermediate_size", None)):
        values["expert_shared_feed_forward_length"] = u32(shared)
    for key, name in (("expert_shared_count", "n_shared_experts"), ("expert_group_count", "n_group"),
                      ("expert_group_used_count", "topk_group")):  # fmt: skip
        if (number := getattr(config, name, None)) is not None:
            values[key] = u32(number)
    if architecture in ("deepseek2", "mistral4", "glm4moe"):
        values["expert_weights_scale"] = f32(config.routed_scaling_factor)
        values["expert_weights_norm"] = (7, bytes([config.norm_topk_prob]))
    if config.model_type in ("deepseek_v3", "glm4_moe", "minimax_m2"):
        values["expert_gating_func"] = u32(2)
    return values


def _hybrid(config: Any) -> Metadata:
    return {
        "ssm.conv_kernel": u32(config.linear_conv_kernel_dim), "ssm.state_size": u32(config.linear_key_head_dim),
        "ssm.group_count": u32(config.linear_num_key_heads), "ssm.time_step_rank": u32(config.linear_num_value_heads),
        "ssm.inner_size": u32(config.linear_value_head_dim * config.linear_num_value_heads),
        "full_attention_interval": u32(4),
    }  # fmt: skip


def _latent(config: Any) -> Metadata:
    rotated = config.qk_rope_head_dim
    values: Metadata = {
        "attention.kv_lora_rank": u32(config.kv_lora_rank), "rope.dimension_count": u32(rotated),
        "attention.head_count_kv": u32(1), "attention.key_length": u32(config.kv_lora_rank + rotated),
        "attention.value_length": u32(config.kv_lora_rank),
        "attention.key_length_mla": u32(config.qk_nope_head_dim + rotated),
        "attention.value_length_mla": u32(config.v_head_dim),
        "leading_dense_block_count": u32(getattr(config, "first_k_dense_replace", 0)),
    }  # fmt: skip
    if config.q_lora_rank:
        values["attention.q_lora_rank"] = u32(config.q_lora_rank)
    if multiplier := config.rope_parameters.get("mscale_all_dim"):
        values["rope.scaling.yarn_log_multiplier"] = f32(0.1 * multiplier)
    return values | _growth(config)


def _growth(config: Any) -> Metadata:
    growth = config.rope_parameters.get("llama_4_scaling_beta")
    return {} if growth is None else {"attention.temperature_scale": f32(growth)}


def _ministral(config: Any) -> Metadata:
    return {"rope.scaling.yarn_log_multiplier": f32(config.rope_parameters["mscale_all_dim"])} | _growth(config)


def _full_heads(config: Any) -> dict[str, int]:
    """Return what layers with full attention have of their own in Gemma 4: the size of a head, maybe KV heads."""
    return next(iter(config.to_dict()["per_layer_config"].values()))


def _gemma4(config: Any) -> Metadata:
    is_sliding = [kind == "sliding_attention" for kind in config.layer_types]
    rope, full, own = config.rope_parameters, _full_heads(config)["head_dim"], config.head_dim
    values: Metadata = {
        "attention.shared_kv_layers": u32(config.num_kv_shared_layers),
        "embedding_length_per_layer_input": u32(config.hidden_size_per_layer_input),
        "attention.sliding_window": u32(config.sliding_window),
        "attention.sliding_window_pattern": bool_array(is_sliding),
        "attention.key_length": u32(full), "attention.value_length": u32(full), "attention.key_length_swa": u32(own),
        "attention.value_length_swa": u32(own), "rope.dimension_count": u32(full),
        "rope.dimension_count_swa": u32(own), "rope.freq_base": f32(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": f32(rope["sliding_attention"]["rope_theta"]),
    }  # fmt: skip
    if config.final_logit_softcapping:
        values["final_logit_softcapping"] = f32(config.final_logit_softcapping)
    if config.attention_k_eq_v:
        both = config.num_key_value_heads, _full_heads(config)["num_key_value_heads"]
        values["attention.head_count_kv"] = int_array([both[0] if sliding else both[1] for sliding in is_sliding])
    if config.use_double_wide_mlp:
        own_layers = config.num_hidden_layers - config.num_kv_shared_layers
        widths = [config.intermediate_size * (1 if layer < own_layers else 2) for layer in range(len(is_sliding))]
        values["feed_forward_length"] = int_array(widths)
    return values


def _llama4(config: Any) -> Metadata:
    return {"feed_forward_length": u32(config.intermediate_size_mlp), "interleave_moe_layer_step": u32(2)}


def _glm(config: Any) -> Metadata:
    return {"leading_dense_block_count": u32(config.first_k_dense_replace)}


_MORE: dict[str, Callable[[Any], Metadata]] = {
    **dict.fromkeys(_HYBRID, _hybrid), "deepseek2": _latent, "mistral4": _latent, "mistral3": _ministral,
    "gemma4": _gemma4, "llama4": _llama4, "glm4moe": _glm,
}  # fmt: skip


def _without_keys(*keys: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for key in keys:
            parts.metadata.pop(f"{parts.architecture}.{key}", None)

    return change


def with_unused_layer(parts: Parts) -> None:
    """Add a layer that predicts further tokens, a copy of the last with tensors of its own, and count it."""
    count = 1 + max(int(name.split(".")[1]) for name in parts.tensors if name.startswith("blk."))
    for name, tensor in list(parts.tensors.items()):
        if name.startswith(f"blk.{count - 1}."):
            parts.tensors[name.replace(f"blk.{count - 1}.", f"blk.{count}.")] = tensor
    parts.add(f"blk.{count}.nextn.enorm.weight", [1.0] * 64)
    parts.set(block_count=u32(count + 1), nextn_predict_layers=u32(1))


_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7,
    "mscale_all_dim": 0.7,
}  # fmt: skip
_GROWN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 8, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4,
}  # fmt: skip
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CHUNKS = {
    "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "moe_layers": [1, 3], "attention_chunk_size": 8192,
    "floor_scale": 8192, "attn_scale": 0.1, "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
    "rope_parameters": _PLAIN_ROPE,
}  # fmt: skip
CONVERTED: dict[str, Converted] = {
    "qwen3next": Converted("qwen3-next", "qwen3next", {"mlp_only_layers": []}),
    "qwen35": Converted("qwen3.5", "qwen35"),
    "qwen35moe": Converted("qwen3.5-moe", "qwen35moe"),
    "qwen35 with an unused layer": Converted("qwen3.5", "qwen35", change=with_unused_layer),
    "qwen35, as many key heads": Converted("qwen3.5", "qwen35", {"linear_num_key_heads": 8}),
    "deepseek2, V2": Converted("deepseek-v2", "deepseek2", {"rope_parameters": _YARN, "norm_topk_prob": False}),
    "deepseek2, V2-Lite": Converted("deepseek-v2-lite", "deepseek2", {"norm_topk_prob": False}),
    "deepseek2, V3": Converted("deepseek-v3", "deepseek2", {"rope_parameters": _YARN}),
    "mistral4": Converted(
        "mistral4",
        "mistral4",
        {"rope_parameters": _GROWN | {"partial_rotary_factor": 16 / 28}, "rope_interleave": True},
    ),
    "mistral3": Converted(
        "ministral3", "mistral3", {"rope_parameters": _GROWN | {"original_max_position_embeddings": 64}}
    ),
    "gemma4": Converted("gemma4", "gemma4"),
    "gemma4, experts": Converted("gemma4-moe", "gemma4"),
    "gemma4, small": Converted("gemma4-small", "gemma4", {"hidden_size_per_layer_input": 16}),
    "glm4moe": Converted("glm4-moe", "glm4moe", change=with_unused_layer),
    "minimax-m2": Converted("minimax-m2", "minimax-m2"),
    "llama4": Converted("llama4", "llama4", _CHUNKS),
}
