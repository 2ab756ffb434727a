"""Turn config.json of a Hugging Face folder into `ModelFacts`, with the defaults of the transformers library."""

from pathlib import Path
from typing import cast, get_args

from mgpu.protocol.checkpoint.experts import expert_facts
from mgpu.protocol.checkpoint.families import CLASSES, FAMILIES, MODEL_TYPES, Family
from mgpu.protocol.checkpoint.huggingface_rope import read_rope
from mgpu.protocol.checkpoint.untrusted import CheckpointError, Fields, Limit, checked_file, read_json_object
from mgpu.protocol.model.facts import Activation, Dtype, ModelFacts


def read_config_facts(folder: Path, is_plain: bool = False) -> ModelFacts:
    """Read config.json and, for its stop tokens, generation_config.json. CheckpointError when unusable.

    ``is_plain`` ignores a quantization that config.json names: the weights beside it are not quantized.
    """
    path = checked_file(folder, "config.json")
    outer = Fields(str(path), read_json_object(path))
    family = _family_of(outer)
    if not is_plain:
        _refuse_quantized(outer)
    fields = outer.nested("text_config") if family == "gemma3" else None
    return _facts(family, outer, fields or outer, _generation_config(folder))


def _family_of(fields: Fields) -> str:
    classes = fields.list_of("architectures", str)
    name = str(classes[0]) if classes else fields.text("model_type", "")
    family = CLASSES.get(name) if classes else MODEL_TYPES.get(name)
    if family is None:
        shown = repr(name[:80]) if name else "not named (no `architectures`, no `model_type`)"
        raise CheckpointError(
            f"{fields.source}: the architecture is {shown}; supported architectures: {', '.join(CLASSES)}"
        )
    return family


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
    _refuse_unsupported(outer)
    _refuse_unsupported(fields)
    base = FAMILIES[family]
    tying = outer if outer.has("tie_word_embeddings") else fields
    hidden = fields.integer("hidden_size", base.hidden_size, high=Limit.HIDDEN)
    num_layers = fields.integer("num_hidden_layers", base.num_layers, high=Limit.LAYERS)
    num_q_heads = fields.integer("num_attention_heads", base.num_q_heads, high=Limit.HEADS)
    head_dim = _head_dim(fields, base, hidden, num_q_heads)
    max_position = fields.integer("max_position_embeddings", base.max_position, high=Limit.POSITION)
    rope = read_rope(fields, family, base.theta, max_position, head_dim)
    window, sliding = _sliding(fields, family, num_layers)
    biased = fields.boolean("attention_bias", False) and family not in ("mistral", "mixtral")
    return ModelFacts(
        architecture=family,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", base.intermediate_size, high=8 * Limit.HIDDEN),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=_num_kv_heads(fields, base, num_q_heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", base.vocab_size, high=Limit.VOCAB),
        max_position=rope.max_position,
        rms_norm_eps=fields.number("rms_norm_eps", base.eps),
        rope_theta=rope.theta,
        rope_local_theta=rope.local_theta,
        rope_scaling=rope.scaling,
        sliding_window=window,
        sliding_layers=sliding,
        qkv_bias=biased or family == "qwen2",
        output_bias=biased and family != "qwen2",
        mlp_bias=family == "llama" and fields.boolean("mlp_bias", False),
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3"),
        tie_embeddings=tying.boolean("tie_word_embeddings", base.tie),
        activation=_activation(fields, family),
        embedding_scale=hidden**0.5 if family == "gemma3" else 1.0,
        attention_scale=_attention_scale(fields, family, head_dim),
        bos_token_id=_bos(base, outer if outer.has("bos_token_id") else fields),
        eos_token_ids=_end_tokens(base, generation, outer if outer.has("eos_token_id") else fields),
        checkpoint_dtype=_dtype(outer, fields),
        experts=expert_facts(fields, family, num_layers),
    )


def _refuse_quantized(fields: Fields) -> None:
    if (quantization := fields.nested("quantization_config")) is not None:
        method = quantization.text("quant_method", "unknown")
        raise CheckpointError(
            f"{fields.source}: the checkpoint is already quantized ({method[:40]}), which is not supported; "
            "use the original weights, or a GGUF file"
        )


def _refuse_unsupported(fields: Fields) -> None:
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if fields.has(key):
            raise fields.error(key, "is set, which is not supported")
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "is true: not a model that generates text")


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


def _sliding(fields: Fields, family: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Return the window and which layers use it; (None, all False) without one."""
    none = None, (False,) * num_layers
    if family == "llama" or (family == "mixtral" and not fields.has("sliding_window")):
        return none
    if fields.declares("sliding_window") and not fields.has("sliding_window"):
        return none
    if family in ("qwen2", "qwen3", "qwen3_moe") and not fields.boolean("use_sliding_window", False):
        return none
    window = fields.integer("sliding_window", 4096)
    slides_everywhere = family in ("mistral", "mixtral", "qwen3_moe")
    types = fields.list_of("layer_types", str, num_layers) if not slides_everywhere else None
    if types is not None:
        return window, tuple(_is_sliding(fields, kind) for kind in types)
    if slides_everywhere:
        return window, (True,) * num_layers
    if family == "gemma3":
        pattern = fields.integer("sliding_window_pattern", 6)
        return window, tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    first = fields.integer("max_window_layers", 28, low=0)
    return window, tuple(layer >= first for layer in range(num_layers))


def _is_sliding(fields: Fields, kind: object) -> bool:
    if kind not in ("sliding_attention", "full_attention"):
        raise fields.error("layer_types", f"has {str(kind)[:40]!r}; supported: sliding_attention, full_attention")
    return kind == "sliding_attention"


def _activation(fields: Fields, family: str) -> Activation:
    if family == "gemma3":
        key, expected, synonyms = "hidden_activation", "gelu_pytorch_tanh", ("gelu_new", "gelu_python_tanh")
    else:
        key, expected, synonyms = "hidden_act", "silu", ("swish", "swish")
    if (name := fields.text(key, expected)) not in (expected, *synonyms):
        raise fields.error(key, f"is {name[:40]!r}; {family} is supported with {expected!r}")
    return "gelu_tanh" if family == "gemma3" else "silu"


def _attention_scale(fields: Fields, family: str, head_dim: int) -> float:
    return float((fields.number("query_pre_attn_scalar", 256.0) if family == "gemma3" else head_dim) ** -0.5)


def _dtype(outer: Fields, fields: Fields) -> Dtype:
    for holder in (outer, fields):
        for key in ("dtype", "torch_dtype"):
            if (name := holder.text(key, "auto").removeprefix("torch.")) == "auto":
                continue
            if name in get_args(Dtype):
                return cast("Dtype", name)
            raise holder.error(key, f"is {name[:40]!r}; supported: float32, float16, bfloat16")
    return "float32"
