"""Tiny models of architectures of GGUF files that differ from a Llama: metadata, and names and shapes of tensors."""

from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]
VOCAB = 6


@dataclass(frozen=True)
class Family:
    metadata: dict[str, Any]
    shapes: Shapes


def families(unit: int) -> dict[str, Family]:
    """Return a model of each, by its architecture; ``unit``: its hidden size, of which all others are multiples."""
    makers = {"qwen35": _qwen35, "deepseek2": _deepseek2, "gemma4": _gemma4, "llama4": _llama4}
    return {name: _whole(name, unit, *make(unit)) for name, make in makers.items()}


def _whole(name: str, unit: int, values: dict[str, Any], shapes: Shapes) -> Family:
    common: dict[str, Any] = {
        "context_length": 64, "embedding_length": unit, "feed_forward_length": unit, "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4,
    }  # fmt: skip
    top = {"token_embd.weight": (VOCAB, unit), "output_norm.weight": (unit,), "output.weight": (VOCAB, unit)}
    metadata = {
        "general.architecture": name,
        **{f"{name}.{key}": value for key, value in (common | values).items()},
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(VOCAB)], "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    return Family(metadata, top | shapes)


def _of_layer(layer: int, shapes: Shapes) -> Shapes:
    return {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}


def _dense(unit: int) -> Shapes:
    return {f"ffn_{part}.weight": (unit, unit) for part in ("gate", "up", "down")}


def _experts(unit: int, count: int) -> Shapes:
    stacks: Shapes = {f"ffn_{part}_exps.weight": (count, unit, unit) for part in ("gate", "up", "down")}
    shared: Shapes = {f"ffn_{part}_shexp.weight": (unit, unit) for part in ("gate", "up", "down")}
    return {"ffn_gate_inp.weight": (count, unit), **stacks, **shared}


def _attention(unit: int, queries: int = 1) -> Shapes:
    return {
        "attn_norm.weight": (unit,), "attn_q.weight": (queries * unit, unit), "attn_k.weight": (unit // 2, unit),
        "attn_v.weight": (unit // 2, unit), "attn_output.weight": (unit, unit),
    }  # fmt: skip


def _qwen35(unit: int) -> tuple[dict[str, Any], Shapes]:
    """Return a linear layer of 1 key head and 2 value heads, a layer of attention, and one that is not used."""
    linear: Shapes = {
        "attn_norm.weight": (unit,), "attn_qkv.weight": (4 * unit, unit), "attn_gate.weight": (2 * unit, unit),
        "ssm_conv1d.weight": (4 * unit, 4), "ssm_dt.bias": (2,), "ssm_a": (2,), "ssm_norm.weight": (unit,),
        "ssm_beta.weight": (2, unit), "ssm_alpha.weight": (2, unit), "ssm_out.weight": (unit, 2 * unit),
    }  # fmt: skip
    norms: Shapes = {f"attn_{part}_norm.weight": (unit // 2,) for part in ("q", "k")}
    rest = {"post_attention_norm.weight": (unit,), **_dense(unit)}
    layers = [linear | rest, _attention(unit, 2) | norms | rest, {"nextn.enorm.weight": (unit,)}]
    values = {
        "block_count": 3, "nextn_predict_layers": 1, "attention.head_count_kv": 1, "attention.key_length": unit // 2,
        "attention.value_length": unit // 2, "rope.dimension_count": unit // 2, "full_attention_interval": 2,
        "ssm.conv_kernel": 4, "ssm.state_size": unit, "ssm.group_count": 1, "ssm.time_step_rank": 2,
        "ssm.inner_size": 2 * unit,
    }  # fmt: skip
    return values, {name: shape for at, each in enumerate(layers) for name, shape in _of_layer(at, each).items()}


def _deepseek2(unit: int) -> tuple[dict[str, Any], Shapes]:
    """Return one layer of latent attention with experts in groups."""
    layer: Shapes = {
        "attn_norm.weight": (unit,), "attn_q_a.weight": (unit, unit), "attn_q_a_norm.weight": (unit,),
        "attn_q_b.weight": (4 * unit, unit), "attn_kv_a_mqa.weight": (2 * unit, unit), "attn_kv_a_norm.weight": (unit,),
        "attn_k_b.weight": (2, unit, unit), "attn_v_b.weight": (2, unit, unit), "attn_output.weight": (unit, 2 * unit),
        "ffn_norm.weight": (unit,), "exp_probs_b.bias": (4,), **_experts(unit, 4),
    }  # fmt: skip
    values = {
        "block_count": 1, "attention.head_count_kv": 1, "attention.q_lora_rank": unit, "attention.kv_lora_rank": unit,
        "attention.key_length": 2 * unit, "attention.value_length": unit, "attention.key_length_mla": 2 * unit,
        "attention.value_length_mla": unit, "rope.dimension_count": unit, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_log_multiplier": 0.1, "expert_count": 4, "expert_used_count": 2, "expert_shared_count": 1,
        "expert_feed_forward_length": unit, "expert_gating_func": 2, "expert_weights_scale": 2.5,
        "expert_weights_norm": True, "expert_group_count": 2, "expert_group_used_count": 1,
    }  # fmt: skip
    return values, _of_layer(0, layer)


def _gemma4(unit: int) -> tuple[dict[str, Any], Shapes]:
    """Return a sliding layer, a full one with wider heads, and two that read their caches, all with further inputs."""
    layers = []
    for at in range(4):
        heads = 2 if at % 2 else 1
        projections: Shapes = {
            "attn_q.weight": (heads * unit, unit), "attn_k.weight": (heads * unit // 2, unit),
            "attn_v.weight": (heads * unit // 2, unit), "attn_output.weight": (unit, heads * unit),
            "attn_q_norm.weight": (heads * unit // 2,), "attn_k_norm.weight": (heads * unit // 2,),
        }  # fmt: skip
        names = "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm"
        inputs: Shapes = {"inp_gate.weight": (unit, unit), "proj.weight": (unit, unit)}
        norms: Shapes = {f"{name}.weight": (unit,) for name in names}
        layers.append(projections | norms | inputs | _dense(unit) | {"layer_output_scale.weight": (1,)})
    values = {
        "block_count": 4, "attention.head_count_kv": [1, 1, 1, 1], "attention.key_length": unit,
        "attention.value_length": unit, "attention.key_length_swa": unit // 2, "attention.value_length_swa": unit // 2,
        "attention.sliding_window": 7, "attention.sliding_window_pattern": [True, False, True, False],
        "attention.shared_kv_layers": 2, "embedding_length_per_layer_input": unit, "rope.dimension_count": unit,
        "rope.dimension_count_swa": unit // 2, "rope.freq_base_swa": 1e4, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    top: Shapes = {
        "per_layer_token_embd.weight": (VOCAB, 4 * unit), "per_layer_model_proj.weight": (4 * unit, unit),
        "per_layer_proj_norm.weight": (unit,),
    }  # fmt: skip
    return values, top | {name: shape for at, each in enumerate(layers) for name, shape in _of_layer(at, each).items()}


def _llama4(unit: int) -> tuple[dict[str, Any], Shapes]:
    """Return a layer with experts."""
    values = {
        "block_count": 1, "attention.head_count_kv": 1, "expert_count": 2, "expert_used_count": 1,
        "expert_feed_forward_length": unit, "interleave_moe_layer_step": 1,
    }  # fmt: skip
    return values, _of_layer(0, _attention(unit) | {"ffn_norm.weight": (unit,)} | _experts(unit, 2))
