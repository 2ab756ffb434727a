"""Turn the metadata of a GGUF file into `ModelFacts`."""

from collections.abc import Mapping
from pathlib import Path

from mgpu.protocol.checkpoint.files.gguf_file import GgufTensor
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, Limit
from mgpu.protocol.checkpoint.gguf.families import ARCHITECTURES, GgufFamily, family_of
from mgpu.protocol.checkpoint.rope.gguf import Located, read_gguf_rope
from mgpu.protocol.model.expert_facts import Clamp, ExpertFacts
from mgpu.protocol.model.facts import Dtype, ModelFacts

Tensors = Mapping[str, GgufTensor]


def gguf_facts(
    path: Path,
    architecture: str,
    metadata: Mapping[str, object],
    located: Located,
    bos_token_id: int | None,
    eos_token_ids: tuple[int, ...],
) -> ModelFacts:
    """Return the facts of a model. CheckpointError for values that cannot be served."""
    fields = Fields(str(path), metadata, architecture + ".")
    tensors = {name: tensor for name, (_, tensor) in located.items()}
    base, family = ARCHITECTURES[architecture], family_of(architecture, fields, tensors)
    _refuse_unsupported(fields, family)
    hidden = fields.integer("embedding_length", high=Limit.HIDDEN)
    num_layers = fields.integer("block_count", high=Limit.LAYERS)
    num_q_heads = fields.integer("attention.head_count", high=Limit.HEADS)
    num_kv_heads = fields.integer("attention.head_count_kv", num_q_heads, high=Limit.HEADS)
    if num_q_heads % num_kv_heads:
        raise fields.error("attention.head_count_kv", f"is {num_kv_heads}, which does not divide {num_q_heads}")
    head_dim = _head_dim(fields, hidden, num_q_heads)
    rotated = _rotated_size(fields, family, head_dim)
    window, sliding = _sliding(fields, base, num_layers)
    theta = fields.number("rope.freq_base", base.theta)
    context = fields.integer("context_length", 4096, high=Limit.POSITION)
    scaling, context = read_gguf_rope(fields, located, theta, rotated, context, truncate=family != "gpt_oss")
    experts = _experts(fields, family, base, num_layers, tensors)
    is_granite = family.startswith("granite")
    return ModelFacts(
        architecture=family,
        hidden_size=hidden,
        intermediate_size=fields.integer(
            "feed_forward_length", None if experts is None else experts.width, high=8 * Limit.HIDDEN
        ),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_vocab_size(path, tensors),
        max_position=context,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=theta,
        rope_local_theta=_local_theta(fields, family, theta),
        rope_scaling=scaling,
        sliding_window=window,
        sliding_layers=sliding,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
        activation="gelu_tanh" if base.is_gemma else "silu",
        embedding_scale=hidden**0.5 if base.is_gemma else _multiplier(fields, is_granite, "embedding_scale"),
        attention_scale=_attention_scale(fields, family, num_layers, hidden / num_q_heads, head_dim),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        checkpoint_dtype=_dtype(tensors),
        experts=experts,
        norms_whole_heads=family in ("olmo2", "olmo3"),
        rotated_size=0 if rotated == head_dim else rotated,
        unrotated_layers=tuple(range(3, num_layers, 4)) if family == "smollm3" else (),
        attention_softcap=fields.number("attn_logit_softcapping", 50.0) if family == "gemma2" else 0.0,
        attention_sinks=family == "gpt_oss",
        residual_scale=_multiplier(fields, is_granite, "residual_scale"),
        logit_scale=1.0 / _multiplier(fields, is_granite, "logit_scale"),
        logit_softcap=fields.number("final_logit_softcapping", 30.0) if family == "gemma2" else 0.0,
    )


def _refuse_unsupported(fields: Fields, family: str) -> None:
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if fields.raw(key) and family != "gemma2":
            raise fields.error(key, f"is {fields.raw(key)!r}, which is not supported")
    for key, plain in (("expert_weights_scale", 1.0), ("expert_gating_func", 1), ("expert_group_count", 1)):
        if fields.raw(key) not in (None, 0, plain) and (key, family) != ("expert_gating_func", "gpt_oss"):
            raise fields.error(key, f"is {fields.raw(key)!r}, which is not supported for {family}")
    for key in ("attention.scale", "embedding_scale", "residual_scale", "logit_scale"):
        if fields.raw(key) not in (None, 0, 1.0) and not family.startswith("granite"):
            raise fields.error(key, f"is {fields.raw(key)!r}, which is not supported for {family}")


def _experts(fields: Fields, family: str, base: GgufFamily, num_layers: int, tensors: Tensors) -> ExpertFacts | None:
    """Return the experts of a model; None if it has none. Layers with a router have some."""
    if not family.endswith(("moe", "moeshared", "gpt_oss", "mixtral")):
        if fields.raw("expert_count"):
            raise fields.error(
                "expert_count", f"is {fields.raw('expert_count')!r}, which is not supported for {family}"
            )
        return None
    count = fields.integer("expert_count", high=Limit.EXPERTS)
    if not fields.has("expert_used_count"):
        raise fields.error("expert_count", f"is {count}, and expert_used_count is missing")
    active = fields.integer("expert_used_count", high=Limit.EXPERTS)
    if active > count:
        raise fields.error("expert_used_count", f"is {active}, more than the {count} experts of expert_count")
    is_wide = family in ("mixtral", "granitemoe", "granitemoeshared", "gpt_oss")
    width = fields.integer("feed_forward_length", 1, high=8 * Limit.HIDDEN)
    width = fields.integer(
        "expert_feed_forward_length", width if is_wide else max(1, width // active), high=8 * Limit.HIDDEN
    )
    shared = 0
    if family in ("qwen2_moe", "granitemoeshared"):
        default = fields.integer("feed_forward_length", width, high=8 * Limit.HIDDEN)
        shared = fields.integer("expert_shared_feed_forward_length", default, high=8 * Limit.HIDDEN)
    is_gpt_oss = family == "gpt_oss"
    return ExpertFacts(
        count,
        active,
        width,
        tuple(f"blk.{layer}.ffn_gate_inp.weight" in tensors for layer in range(num_layers)),
        normalizes=fields.boolean("expert_weights_norm", base.norms_weights),
        router_bias=is_gpt_oss,
        bias=is_gpt_oss,
        shared_width=shared,
        shared_gate=family == "qwen2_moe",
        clamp=Clamp(1.702, 7.0) if is_gpt_oss else None,
    )


def _head_dim(fields: Fields, hidden: int, num_q_heads: int) -> int:
    if not fields.has("attention.key_length") and hidden % num_q_heads:
        raise fields.error("embedding_length", f"is {hidden}, not a multiple of the {num_q_heads} attention heads")
    head_dim = fields.integer("attention.key_length", hidden // num_q_heads, high=Limit.HEAD_DIM)
    if (other := fields.integer("attention.value_length", head_dim)) != head_dim:
        raise fields.error(
            "attention.value_length", f"is {other}, unlike the head size {head_dim}, which is not supported"
        )
    if head_dim % 2:
        raise fields.error("attention.key_length", f"is {head_dim}; rotary embeddings need an even number")
    return head_dim


def _rotated_size(fields: Fields, family: str, head_dim: int) -> int:
    """Return how many components of a head are rotated."""
    rotated = fields.integer("rope.dimension_count", head_dim)
    if rotated == head_dim or (family == "phi3" and rotated % 2 == 0 and rotated < head_dim):
        return rotated
    raise fields.error("rope.dimension_count", f"is {rotated}, unlike the head size {head_dim}, which is not supported")


def _vocab_size(path: Path, tensors: Tensors) -> int:
    """Return the rows of the embedding: the token list may be shorter, and `vocab_size` is often absent."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: the tensor 'token_embd.weight' is missing or not a matrix")
    if embedding.shape[0] > Limit.VOCAB:
        raise CheckpointError(f"{path}: a vocabulary of {embedding.shape[0]} is more than the {Limit.VOCAB} allowed")
    return embedding.shape[0]


def _sliding(fields: Fields, base: GgufFamily, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    if not base.period or fields.raw("attention.sliding_window") in (None, 0):  # Phi-4 has 0
        return None, (False,) * num_layers
    window = fields.integer("attention.sliding_window")
    pattern = fields.raw("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        flags = fields.list_of("attention.sliding_window_pattern", bool, num_layers)
        return window, tuple(bool(flag) for flag in flags or ())
    period = fields.integer("attention.sliding_window_pattern", base.period)
    return window, tuple((layer + 1) % period != 0 for layer in range(num_layers))


def _local_theta(fields: Fields, family: str, theta: float) -> float | None:
    """Return the theta of layers with a window, whose rotary embedding is not scaled; None if all layers are alike."""
    if family == "gemma3":
        return fields.number("rope.freq_base_swa", 1e4)
    return theta if family == "olmo3" else None


def _multiplier(fields: Fields, is_granite: bool, key: str) -> float:
    """Return one of Granite's factors; 0 stands for 1, as in llama.cpp."""
    return fields.number(key, 1.0) if is_granite and fields.raw(key) != 0 else 1.0


def _attention_scale(fields: Fields, family: str, num_layers: int, width: float, head_dim: int) -> float:
    if family.startswith("granite") and fields.raw("attention.scale"):
        return fields.number("attention.scale")
    # GGUF has no query_pre_attn_scalar; only the models of 27B deviate from the head size.
    is_odd = (family, num_layers) in (("gemma3", 62), ("gemma2", 46))
    return float((width if is_odd else head_dim) ** -0.5)


def _dtype(tensors: Tensors) -> Dtype:
    """Return the float type of the weights. Quantized ones are meant to be computed in bfloat16."""
    kinds = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) >= 2}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds and kinds <= {"F16", "F32"} else "bfloat16"
