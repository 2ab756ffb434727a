"""Turn config.json of a Hugging Face folder into `ModelFacts`, with the defaults of the transformers library."""

import os
from pathlib import Path
from typing import cast, get_args

from mgpu.protocol.checkpoint.files.untrusted import (
    CheckpointError,
    Fields,
    Limit,
    checked_file,
    read_json_object,
    reading,
)
from mgpu.protocol.checkpoint.files.wrong_kind import folder_without_config
from mgpu.protocol.checkpoint.huggingface.borrowed import BORROWED, borrowed_facts, borrowed_type
from mgpu.protocol.checkpoint.huggingface.experts import expert_facts
from mgpu.protocol.checkpoint.huggingface.families import CLASSES, FAMILIES, MODEL_TYPES, Family
from mgpu.protocol.checkpoint.huggingface.full_heads import full_heads
from mgpu.protocol.checkpoint.huggingface.latent import latent_facts, latent_scale, with_default_rope
from mgpu.protocol.checkpoint.huggingface.linear import linear_facts
from mgpu.protocol.checkpoint.huggingface.sliding import read_sliding, unrotated_layers
from mgpu.protocol.checkpoint.huggingface.small_gemma import cache_sources, per_layer_inputs, sharing_width
from mgpu.protocol.checkpoint.quantized.config import SchemeOf, read_schemes, refusal
from mgpu.protocol.checkpoint.rope.huggingface import read_rope, rotated_size
from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.facts import HYBRID, LATENT, Activation, Dtype, ModelCode, ModelFacts


def read_config_facts(folder: Path, is_plain: bool = False, code: ModelCode = "auto") -> ModelFacts:
    """Read config.json and, for its stop tokens, generation_config.json. CheckpointError when unusable.

    ``is_plain`` ignores a quantization that config.json names; else it is refused, since there are no weights.
    """
    if folder.is_dir() and not os.path.lexists(folder / "config.json"):
        with reading(folder):
            hint = folder_without_config(folder)
        raise CheckpointError(f"{folder}: not a model folder: no config.json{f'; {hint}' if hint else ''}")
    path = checked_file(folder, "config.json")
    outer = Fields(str(path), read_json_object(path))
    if kind := borrowed_type(outer, code):
        none = FAMILIES["qwen3"]  # a family without default tokens
        ends = _end_tokens(none, _generation_config(folder), outer)
        return borrowed_facts(outer, kind, ends, _bos(none, outer), _dtype(outer, outer))
    family = _family_of(outer)
    is_own = family == "gpt_oss" and _is_mxfp4(outer)
    if not is_plain and outer.nested("quantization_config") is not None and not is_own:
        raise refusal(outer)
    fields = outer.nested("text_config") or outer
    if family == "mistral" and fields is not outer:
        family = _text_family(fields)
    return _facts(family, outer, fields, _generation_config(folder))


def read_config_schemes(folder: Path, family: str) -> SchemeOf | None:
    """Return how the modules of a folder are quantized; None for gpt-oss' own way."""
    path = checked_file(folder, "config.json")
    outer = Fields(str(path), read_json_object(path))
    inner = outer.nested("text_config")
    holder = outer if inner is None or outer.has("quantization_config") else inner
    return None if family == "gpt_oss" and _is_mxfp4(holder) else read_schemes(holder)


def is_config_quantized(folder: Path) -> bool:
    """Return True if config.json names a quantization."""
    path = checked_file(folder, "config.json")
    outer = Fields(str(path), read_json_object(path))
    inner = outer.nested("text_config")
    holders = [holder for holder in (outer, inner) if holder is not None]
    return any(holder.nested("quantization_config") is not None for holder in holders)


def _is_mxfp4(fields: Fields) -> bool:
    quantization = fields.nested("quantization_config")
    return quantization is None or quantization.text("quant_method", "") == "mxfp4"


def _family_of(fields: Fields) -> str:
    classes = fields.list_of("architectures", str)
    name = str(classes[0]) if classes else fields.text("model_type", "")
    family = CLASSES.get(name) if classes else MODEL_TYPES.get(name)
    if family is None:
        shown = repr(name[:80]) if name else "not named (no `architectures`, no `model_type`)"
        raise CheckpointError(
            f"{fields.source}: the architecture is {shown}{_what_is_missing(fields)}; supported architectures: "
            f"{', '.join(CLASSES)}; through transformers' code: {', '.join(BORROWED.values())}"
        )
    return family


_FOREIGN_KEYS = {
    "index_n_heads": "sparse attention", "kv_lora_rank": "latent attention of another kind",
    "is_encoder_decoder": "cross attention",
    "cross_attention_layers": "cross attention", "mamba_d_state": "recurrent states",
    "ssm_state_size": "recurrent states",
    "state_size": "recurrent states", "linear_num_value_heads": "recurrent states", "lru_width": "recurrent states",
    "rwkv_version": "recurrent states", "full_attn_idxs": "recurrent states",
}  # fmt: skip
"""Keys of models whose code needs what mgpu does not have."""


def _what_is_missing(fields: Fields) -> str:
    """Return what a model of an unknown architecture would need besides, by the first key that tells."""
    for key, part in _FOREIGN_KEYS.items():
        if fields.has(key) and fields.raw(key) is not False:
            return f", which needs {part} ({key}), and mgpu has none"
    return ""


def _text_family(fields: Fields) -> str:
    """Return the family of a multimodal Mistral's text model."""
    kind = fields.text("model_type", "mistral")
    if kind not in ("mistral", "ministral", "ministral3", "mistral4"):
        raise fields.error("model_type", f"is {kind[:40]!r}; supported: mistral, ministral, ministral3, mistral4")
    return kind


def _generation_config(folder: Path) -> Fields:
    if not (folder / "generation_config.json").is_file():
        return Fields("", {})
    path = checked_file(folder, "generation_config.json")
    return Fields(str(path), read_json_object(path))


def _end_tokens(base: Family, *files: Fields) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of the first file that names any.

    The class default counts only when no file has the key: an explicit null, or -1, means none.
    """
    for fields in files:
        if fields.has("eos_token_id"):
            return tuple(dict.fromkeys(fields.token_ids("eos_token_id")))
    return () if any(fields.declares("eos_token_id") for fields in files) else base.eos


def _bos(base: Family, fields: Fields) -> int | None:
    default = None if fields.declares("bos_token_id") else base.bos
    return next(iter(fields.token_ids("bos_token_id")), None) if fields.has("bos_token_id") else default


def _facts(family: str, outer: Fields, fields: Fields, generation: Fields) -> ModelFacts:
    for holder in (outer, fields):
        _refuse_unsupported(holder, family)
    if family == "gemma4":
        _refuse_unsupported_gemma4(fields)
    base = FAMILIES[family]
    tying = outer if outer.has("tie_word_embeddings") else fields
    hidden = fields.integer("hidden_size", base.hidden_size, high=Limit.HIDDEN)
    vocab_size = fields.integer("vocab_size", base.vocab_size, high=Limit.VOCAB)
    num_layers = fields.integer("num_hidden_layers", base.num_layers, high=Limit.LAYERS)
    num_q_heads = fields.integer("num_attention_heads", base.num_q_heads, high=Limit.HEADS)
    fields = with_default_rope(fields, family)
    latent = latent_facts(fields, family)
    head_dim = _head_dim(fields, base, hidden, num_q_heads) if latent is None else latent.width
    max_position = fields.integer("max_position_embeddings", base.max_position, high=Limit.POSITION)
    rotated = rotated_size(fields, family, head_dim if latent is None else latent.rotated)
    window, sliding = read_sliding(fields, family, num_layers)
    full = full_heads(fields, family, num_q_heads, sliding)
    rope = read_rope(fields, family, base.theta, max_position, rotated if full is None else full.rotated_size)
    qkv_bias, output_bias = _biases(fields, base)
    ignored = _multi_token_layers(fields, family)
    return ModelFacts(
        architecture=family,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(fields, family, base),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=_num_kv_heads(fields, base, num_q_heads) if latent is None else 1,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position=rope.max_position,
        rms_norm_eps=fields.number("rms_norm_eps", base.eps),
        rope_theta=rope.theta,
        rope_local_theta=rope.local_theta,
        rope_scaling=rope.scaling,
        sliding_window=window,
        sliding_layers=sliding,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=base.mlp_bias and fields.boolean("mlp_bias", False),
        qk_norm=fields.boolean("use_qk_norm", False) if family == "glm4_moe" else base.qk_norm,
        tie_embeddings=tying.boolean("tie_word_embeddings", base.tie),
        activation=_activation(fields, family, base),
        embedding_scale=hidden**0.5 if base.is_gemma else _multiplier(fields, base, "embedding_multiplier"),
        attention_scale=_attention_scale(fields, family, base, latent or head_dim),
        bos_token_id=_bos(base, outer if outer.has("bos_token_id") else fields),
        eos_token_ids=_end_tokens(base, generation, outer if outer.has("eos_token_id") else fields),
        checkpoint_dtype=_dtype(outer, fields),
        experts=expert_facts(fields, family, num_layers),
        norms_whole_heads=family in ("olmo2", "olmo3", "minimax_m2"),
        rotated_size=0 if latent is not None or rotated == head_dim else rotated,
        unrotated_layers=unrotated_layers(fields, num_layers) if family in ("smollm3", "llama4") else (),
        windows_are_chunks=family == "llama4",
        plain_qk_norm=family == "llama4" and fields.boolean("use_qk_norm", True),
        query_growth=_query_growth(fields, family),
        growth_from=fields.integer("floor_scale", 8192) if family == "llama4" else 1,
        attention_softcap=_softcap(fields, family, "attn_logit_softcapping", 50.0),
        attention_sinks=family == "gpt_oss",
        residual_scale=_multiplier(fields, base, "residual_multiplier"),
        logit_scale=1.0 / _multiplier(fields, base, "logits_scaling"),
        logit_softcap=_softcap(fields, family, "final_logit_softcapping", 30.0),
        full_heads=full,
        cache_sources=cache_sources(fields, family, sliding),
        sharing_width=sharing_width(fields, family),
        per_layer=per_layer_inputs(fields, family, vocab_size),
        value_norm=family == "gemma4",
        layer_scale=family == "gemma4",
        attention_gate=family in HYBRID,
        linear=linear_facts(fields, family, num_layers),
        latent=latent,
        left_out=("its multi-token head",) if ignored else (),
        ignored_layers=0 if family in HYBRID else ignored,
    )


def _multi_token_layers(fields: Fields, family: str) -> int:
    """Return the layers that only predict several tokens at once, which are not used."""
    key = "mtp_num_hidden_layers" if family in HYBRID else "num_nextn_predict_layers"
    is_known = family in (*HYBRID, *LATENT, "glm4_moe") and fields.has(key)
    return fields.integer(key, low=0, high=Limit.LAYERS) if is_known else 0


def _biases(fields: Fields, base: Family) -> tuple[bool, bool]:
    """Return whether q, k and v have biases, and whether the output projection has one."""
    if base.biases in ("none", "qkv"):
        return base.biases == "qkv", False
    key = "qkv_bias" if base.biases == "asked qkv" else "attention_bias"
    biased = fields.boolean(key, base.has_bias)
    return biased, biased and base.biases == "asked"


def _intermediate_size(fields: Fields, family: str, base: Family) -> int:
    """Return the width of dense feed-forward networks; Llama 4's key without an end is that of its experts."""
    if family == "llama4":
        return fields.integer("intermediate_size_mlp", 16384, high=8 * Limit.HIDDEN)
    return fields.integer("intermediate_size", base.intermediate_size, high=8 * Limit.HIDDEN)


def _query_growth(fields: Fields, family: str) -> float:
    if family != "llama4" or not fields.boolean("attn_temperature_tuning", True):
        return 0.0
    return fields.number("attn_scale", 0.1)


def _multiplier(fields: Fields, base: Family, key: str) -> float:
    return fields.number(key, 1.0) if base.is_granite else 1.0


def _softcap(fields: Fields, family: str, key: str, default: float) -> float:
    """Return the cap of Gemma 2 and 4; 0 where it is null, and in Gemma 4 where it is absent."""
    is_none = not fields.has(key) and (fields.declares(key) or family == "gemma4")
    return 0.0 if is_none or key not in _CAPS.get(family, ()) else fields.number(key, default)


def _refuse_unsupported(fields: Fields, family: str) -> None:
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if fields.has(key) and key not in _CAPS.get(family, ()):
            raise fields.error(key, "is set, which is not supported")
    biases = ("attention_bias", "mlp_bias") if family in LATENT else ("attention_bias",)
    for key in biases if family in (*HYBRID, *LATENT, "gemma4") else ():
        if fields.boolean(key, False):
            raise fields.error(key, f"is true, which is not supported for {family}")
    if family != "gemma4" and fields.boolean("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "is true: not a model that generates text")


_CAPS = {"gemma2": ("final_logit_softcapping", "attn_logit_softcapping"), "gemma4": ("final_logit_softcapping",)}


def _refuse_unsupported_gemma4(fields: Fields) -> None:
    whose = fields.text("use_bidirectional_attention", "vision")  # vision: of text, all attention is causal
    if whose != "vision":
        raise fields.error("use_bidirectional_attention", f"is {whose[:40]!r}: not a model that generates text")


def _head_dim(fields: Fields, base: Family, hidden: int, num_q_heads: int) -> int:
    default = base.head_dim or hidden // num_q_heads
    if not fields.has("head_dim") and base.head_dim is None and hidden % num_q_heads:
        raise fields.error("hidden_size", f"is {hidden}, not a multiple of the {num_q_heads} attention heads")
    head_dim = fields.integer("head_dim", default, high=Limit.HEAD_DIM)
    if head_dim % 2:
        raise fields.error("head_dim", f"is {head_dim}; rotary embeddings need an even number")
    return head_dim


def _num_kv_heads(fields: Fields, base: Family, num_q_heads: int) -> int:
    # An explicit null means "as many as query heads"; an absent key means the class default.
    default = num_q_heads if fields.declares("num_key_value_heads") else base.num_kv_heads or num_q_heads
    num_kv_heads = fields.integer("num_key_value_heads", default, high=Limit.HEADS)
    if num_q_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_q_heads} query heads")
    return num_kv_heads


def _activation(fields: Fields, family: str, base: Family) -> Activation:
    if base.is_gemma:
        key, expected, synonyms = "hidden_activation", "gelu_pytorch_tanh", ("gelu_new", "gelu_python_tanh")
    else:
        key, expected, synonyms = "hidden_act", "silu", ("swish", "swish")
    if (name := fields.text(key, expected)) not in (expected, *synonyms):
        raise fields.error(key, f"is {name[:40]!r}; {family} is supported with {expected!r}")
    return "gelu_tanh" if base.is_gemma else "silu"


def _attention_scale(fields: Fields, family: str, base: Family, head: int | LatentFacts) -> float:
    if family == "gemma4":
        return 1.0
    if isinstance(head, LatentFacts):
        return latent_scale(fields, head)
    if base.is_granite:
        return fields.number("attention_multiplier", 1.0)
    return float((fields.number("query_pre_attn_scalar", 256.0) if base.is_gemma else head) ** -0.5)


def _dtype(outer: Fields, fields: Fields) -> Dtype:
    for holder in (outer, fields):
        for key in ("dtype", "torch_dtype"):
            if (name := holder.text(key, "auto").removeprefix("torch.")) == "auto":
                continue
            if name in get_args(Dtype):
                return cast("Dtype", name)
            raise holder.error(key, f"is {name[:40]!r}; supported: float32, float16, bfloat16")
    return "float32"
