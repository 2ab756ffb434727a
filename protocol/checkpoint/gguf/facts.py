"""Turn the metadata of a GGUF file into `ModelFacts`."""

from dataclasses import replace
from pathlib import Path

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.checkpoint.gguf.experts import gguf_experts
from mgpu.protocol.checkpoint.gguf.families import ARCHITECTURES, family_of
from mgpu.protocol.checkpoint.gguf.gemma4 import gemma4_heads, gemma4_inputs, gemma4_sources, gemma4_widths
from mgpu.protocol.checkpoint.gguf.heads import Heads, gguf_heads
from mgpu.protocol.checkpoint.gguf.latent import gguf_latent, gguf_latent_scale
from mgpu.protocol.checkpoint.gguf.linear import gguf_linear
from mgpu.protocol.checkpoint.gguf.sliding import gguf_sliding, unrotated_layers
from mgpu.protocol.checkpoint.gguf.tensors import float_type, rows_in_table
from mgpu.protocol.checkpoint.rope.gguf import Located, read_gguf_rope
from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.facts import HYBRID, ModelFacts

_MOST_UNUSED_LAYERS = 64


def gguf_facts(
    path: Path,
    architecture: str,
    metadata: dict[str, object],
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
    num_layers, unused = _layers(fields)
    latent, linear = gguf_latent(fields, family, tensors), gguf_linear(fields, family, num_layers, tensors)
    window, sliding = gguf_sliding(fields, family, base, num_layers)
    full, sources = None, tuple[int, ...]()
    if family == "gemma4":
        heads, full = gemma4_heads(fields, sliding, located, tensors)
        sources = gemma4_sources(fields, sliding)
    elif latent is not None:
        heads = Heads(fields.integer("attention.head_count", high=Limit.HEADS), 1, latent.width, latent.rotated)
    else:
        heads = gguf_heads(fields, family, hidden)
    theta = fields.number("rope.freq_base", base.theta)
    scaling, context = read_gguf_rope(fields, {} if full else located, family, theta, heads.rotated)
    experts = gguf_experts(fields, family, base, num_layers, tensors)
    width, sharing_width = _widths(fields, family, sources, None if experts is None else experts.width)
    first = f"blk.{0 if linear is None else linear.layers.index(False)}."
    is_granite = family.startswith("granite")
    has_chunks = family == "llama4" and window is not None
    facts = ModelFacts(
        architecture=family,
        hidden_size=hidden,
        intermediate_size=width,
        num_layers=num_layers,
        num_q_heads=heads.num_q,
        num_kv_heads=heads.num_kv,
        head_dim=heads.head_dim,
        vocab_size=rows_in_table(path, tensors, "token_embd.weight"),
        max_position=context,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=theta,
        rope_local_theta=_local_theta(fields, family, theta),
        rope_scaling=scaling,
        sliding_window=window,
        sliding_layers=sliding,
        qkv_bias=first + "attn_q.bias" in tensors,
        output_bias=first + "attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm=first + "attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
        activation="gelu_tanh" if base.is_gemma else "silu",
        embedding_scale=hidden**0.5 if base.is_gemma else _multiplier(fields, is_granite, "embedding_scale"),
        attention_scale=_attention_scale(fields, family, num_layers, hidden, heads, latent),
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        checkpoint_dtype=float_type(tensors),
        experts=experts,
        norms_whole_heads=family in ("olmo2", "olmo3", "minimax_m2"),
        rotated_size=0 if latent is not None or heads.rotated == heads.head_dim else heads.rotated,
        unrotated_layers=unrotated_layers(family, num_layers, window is not None),
        windows_are_chunks=family == "llama4",
        # llama.cpp knows Llama 4 Maverick, whose queries and keys are not normalized, by its experts.
        plain_qk_norm=family == "llama4" and (experts is None or experts.count != 128),
        query_growth=0.1 if has_chunks else 0.0,
        growth_from=8192 if has_chunks else 1,
        attention_softcap=fields.number("attn_logit_softcapping", 50.0) if family == "gemma2" else 0.0,
        attention_sinks=family == "gpt_oss",
        residual_scale=_multiplier(fields, is_granite, "residual_scale"),
        logit_scale=1.0 / _multiplier(fields, is_granite, "logit_scale"),
        logit_softcap=_logit_softcap(fields, family),
        full_heads=full,
        cache_sources=sources,
        sharing_width=sharing_width,
        attention_gate=family in HYBRID,
        linear=linear,
        latent=latent,
        left_out=("its multi-token head",) if unused else (),
        ignored_layers=unused,
    )
    if family != "gemma4":
        return facts
    return replace(facts, per_layer=gemma4_inputs(fields, path, tensors), value_norm=True, layer_scale=True)


def _refuse_unsupported(fields: Fields, family: str) -> None:
    allowed = {"final_logit_softcapping": ("gemma2", "gemma4"), "attn_logit_softcapping": ("gemma2",)}
    for key, families in allowed.items():
        if fields.raw(key) and family not in families:
            raise fields.error(key, f"is {fields.raw(key)!r}, which is not supported")
    for key in ("attention.scale", "embedding_scale", "residual_scale", "logit_scale"):
        if fields.raw(key) not in (None, 0, 1.0) and not family.startswith("granite"):
            raise fields.error(key, f"is {fields.raw(key)!r}, which is not supported for {family}")


def _layers(fields: Fields) -> tuple[int, int]:
    """Return the layers that are used, and those after them that only predict further tokens."""
    count = fields.integer("block_count", high=Limit.LAYERS)
    unused = fields.integer("nextn_predict_layers", 0, low=0, high=_MOST_UNUSED_LAYERS)
    if unused >= count:
        raise fields.error("nextn_predict_layers", f"is {unused}, and there are {count} layers in all")
    return count - unused, unused


def _widths(fields: Fields, family: str, sources: tuple[int, ...], default: int | None) -> tuple[int, int]:
    """Return the width of dense feed-forward networks, and how much wider those of layers are that share a cache."""
    if family == "gemma4":
        return gemma4_widths(fields, sources)
    return fields.integer("feed_forward_length", default, high=8 * Limit.HIDDEN), 1


def _local_theta(fields: Fields, family: str, theta: float) -> float | None:
    """Return the theta of layers with a window, whose rotary embedding is not scaled; None if all layers are alike."""
    if family in ("gemma3", "gemma4"):
        return fields.number("rope.freq_base_swa", 1e4)
    return theta if family == "olmo3" else None


def _multiplier(fields: Fields, is_granite: bool, key: str) -> float:
    """Return one of Granite's factors; 0 stands for 1, as in llama.cpp."""
    return fields.number(key, 1.0) if is_granite and fields.raw(key) != 0 else 1.0


def _logit_softcap(fields: Fields, family: str) -> float:
    if family == "gemma2":
        return fields.number("final_logit_softcapping", 30.0)
    return fields.number("final_logit_softcapping") if fields.raw("final_logit_softcapping") else 0.0


def _attention_scale(
    fields: Fields, family: str, num_layers: int, hidden: int, heads: Heads, latent: LatentFacts | None
) -> float:
    if family == "gemma4":
        return 1.0
    if latent is not None:
        return gguf_latent_scale(fields, latent)
    if family.startswith("granite") and fields.raw("attention.scale"):
        return fields.number("attention.scale")
    # GGUF has no query_pre_attn_scalar; only the models of 27B deviate from the head size.
    is_odd = (family, num_layers) in (("gemma3", 62), ("gemma2", 46))
    return float((hidden / heads.num_q if is_odd else heads.head_dim) ** -0.5)
