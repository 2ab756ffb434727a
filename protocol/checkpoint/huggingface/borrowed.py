"""Families that mgpu has no code for and runs through transformers' modelling code: what is known of them beforehand.

The classes' own defaults are unknown here, since the library would load torch. So config.json must have every size;
files that transformers wrote have them.
"""

import math

from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, Limit
from mgpu.protocol.checkpoint.huggingface.borrowed_experts import borrowed_experts
from mgpu.protocol.model.facts import BorrowedCode, Dtype, ModelCode, ModelFacts

BORROWED = {
    "ArceeForCausalLM": "arcee",
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2",
    "CwmForCausalLM": "cwm",
    "Dots1ForCausalLM": "dots1",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "Exaone4ForCausalLM": "exaone4",
    "ExaoneMoeForCausalLM": "exaone_moe",
    "FlexOlmoForCausalLM": "flex_olmo",
    "GemmaForCausalLM": "gemma",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm4",
    "HeliumForCausalLM": "helium",
    "HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe",
    "HyperCLOVAXForCausalLM": "hyperclovax",
    "Jais2ForCausalLM": "jais2",
    "MellumForCausalLM": "mellum",
    "NemotronForCausalLM": "nemotron",
    "OlmoForCausalLM": "olmo",
    "OlmoeForCausalLM": "olmoe",
    "PersimmonForCausalLM": "persimmon",
    "PhiForCausalLM": "phi",
    "PhimoeForCausalLM": "phimoe",
    "SeedOssForCausalLM": "seed_oss",
    "SolarOpenForCausalLM": "solar_open",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
    "VaultGemmaForCausalLM": "vaultgemma",
}
"""Classes of transformers, and the `model_type` of each."""

OWN_TOO = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Families of mgpu's own that transformers' code runs if it is asked for."""

UNSPLIT = ("flex_olmo", "olmoe", "persimmon", "stablelm")
"""Families whose attention is not split, for transformers has no plan to do it, or norms go over all heads: one worker,
or layers mapped to workers."""


_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LAYER_KINDS = ("full_attention", "sliding_attention")
"""Rotary embeddings may differ by kind of layer."""


def borrowed_type(fields: Fields, code: ModelCode) -> str:
    """Return the `model_type` of a model that transformers' code is to run; '' if mgpu's own code is.

    CheckpointError if that code is asked for by name, and the family has not been tested with it.
    """
    classes = fields.list_of("architectures", str)
    name = str(classes[0]) if classes else ""
    if code == "own":
        return ""
    kind = BORROWED.get(name, "")
    if code == "transformers":
        kind = kind or OWN_TOO.get(name, "")
        if not kind:
            raise CheckpointError(
                f"{fields.source}: --model-code transformers: the architecture is {name[:80]!r}; it is tested with: "
                f"{', '.join((*BORROWED, *OWN_TOO))}"
            )
    if kind and fields.text("model_type", "") != kind:
        raise fields.error("model_type", f"is {fields.text('model_type', '')[:40]!r}; {name} needs {kind!r}")
    return kind


def borrowed_facts(
    fields: Fields, kind: str, eos_token_ids: tuple[int, ...], bos_token_id: int | None, dtype: Dtype
) -> ModelFacts:
    """Return the sizes of a model that transformers' code runs. CheckpointError if config.json lacks one."""
    if fields.nested("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "says that weights are quantized already, which transformers' code cannot run here"
        )
    _check_rope(fields)
    hidden = fields.integer("hidden_size", high=Limit.HIDDEN)
    layers = fields.integer("num_hidden_layers", high=Limit.LAYERS)
    num_q = fields.integer("num_attention_heads", high=Limit.HEADS)
    num_kv = fields.integer("num_key_value_heads", num_q, high=Limit.HEADS)
    if num_q % num_kv:
        raise fields.error("num_key_value_heads", f"is {num_kv}, which does not divide {num_q} query heads")
    if not fields.has("head_dim") and hidden % num_q:
        raise fields.error("hidden_size", f"is {hidden}, not a multiple of the {num_q} attention heads")
    head_dim = fields.integer("head_dim", hidden // num_q, high=Limit.HEAD_DIM)
    experts = borrowed_experts(fields, kind, layers)
    return ModelFacts(
        architecture=kind,
        hidden_size=hidden,
        intermediate_size=fields.integer(
            "intermediate_size", None if experts is None else experts.width, high=8 * Limit.HIDDEN
        ),
        num_layers=layers,
        num_q_heads=num_q,
        num_kv_heads=num_kv,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", high=Limit.VOCAB),
        max_position=fields.integer("max_position_embeddings", high=Limit.POSITION),
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_local_theta=None,
        rope_scaling=None,
        sliding_window=None,
        sliding_layers=(False,) * layers,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        activation="silu",
        embedding_scale=1.0,
        attention_scale=1.0,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        checkpoint_dtype=dtype,
        experts=experts,
        ignored_layers=fields.integer("num_nextn_predict_layers", 0, low=0, high=64),
        borrowed=BorrowedCode((), kind not in UNSPLIT),
    )


def _check_rope(fields: Fields) -> None:
    """Raise CheckpointError for a rotary embedding that the library does not know."""
    for key in ("rope_parameters", "rope_scaling"):
        if (outer := fields.nested(key)) is None:
            continue
        inner = (outer.nested(kind) for kind in _LAYER_KINDS if outer.has(kind))
        for rope in (outer, *(each for each in inner if each is not None)):
            name = rope.text("rope_type", rope.text("type", "default"))
            if name not in _ROPE_TYPES:
                raise fields.error(key, f"rope_type is {name[:40]!r}; supported: {', '.join(_ROPE_TYPES)}")


_OF_KEYS = ("k_proj", "v_proj", "k_norm")
"""What a checkpoint may have of layers that read the cache of another."""


def without_ignored(facts: ModelFacts, tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Leave out what transformers does not use: layers that predict further tokens, and keys that no layer computes."""
    first = facts.num_layers
    ignored = tuple(f"model.layers.{layer}." for layer in range(first, first + facts.ignored_layers))
    sharing = [layer for layer in range(first) if facts.cache_source(layer) != layer]
    ignored += tuple(f"model.layers.{layer}.self_attn.{part}." for layer in sharing for part in _OF_KEYS)
    return {name: entry for name, entry in tensors.items() if not name.startswith(ignored)}


def layer_elements(source: str, num_layers: int, tensors: dict[str, TensorEntry]) -> tuple[int, ...]:
    """Return the elements of each layer's tensors. CheckpointError if a layer has none, or there are others."""
    counts = [0] * num_layers
    for name, entry in tensors.items():
        if not name.startswith("model.layers."):
            continue
        index = name.split(".")[2]
        if not index.isdecimal() or int(index) >= num_layers:
            raise CheckpointError(f"{source}: tensor {name!r} is of no layer: the configuration says {num_layers}")
        counts[int(index)] += math.prod(entry.shape)
    if 0 in counts:
        raise CheckpointError(f"{source}: layer {counts.index(0)} of {num_layers} has no tensors")
    return tuple(counts)
