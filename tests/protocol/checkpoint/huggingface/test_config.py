"""Facts from config.json: every family, old and new style, defaults as in transformers, and refusals."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.models.model_files import LLAMA_CONFIG, write_config
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.protocol.checkpoint.rope.rules import llama3_divisors
from mgpu.protocol.model.attention_facts import RopeScaling
from mgpu.protocol.model.facts import ModelFacts

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rope_theta": 1000000, "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA31_SCALING = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip


def facts_of(folder: Path, config: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelFacts:
    write_config(folder, config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config_facts(folder)


def refusal(folder: Path, config: Mapping[str, object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        facts_of(folder, config)
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def test_qwen3_has_its_own_head_size_and_norms(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, QWEN3)
    assert (facts.architecture, facts.head_dim, facts.qk_norm, facts.qkv_bias) == ("qwen3", 128, True, False)
    assert (facts.num_q_heads, facts.num_kv_heads, facts.num_layers) == (64, 8, 64)
    assert (facts.rope_theta, facts.attention_scale, facts.checkpoint_dtype) == (1e6, 128**-0.5, "bfloat16")
    assert (facts.sliding_window, facts.tie_embeddings, facts.eos_token_ids) == (None, False, (151645,))


@pytest.mark.parametrize("style", [
    {"rope_theta": 500000.0, "rope_scaling": LLAMA31_SCALING},
    {"rope_theta": 500000.0, "rope_scaling": {**LLAMA31_SCALING, "rope_type": None, "type": "llama3"}},
    {"rope_parameters": {"rope_theta": 500000.0, **LLAMA31_SCALING}},
], ids=["old", "older", "transformers 5"])  # fmt: skip
def test_llama31_scaling_is_read_in_every_style(tmp_path: Path, style: dict[str, object]) -> None:
    facts = facts_of(tmp_path, LLAMA_CONFIG | style)
    assert facts.rope_theta == 500000.0
    assert facts.rope_scaling == RopeScaling(llama3_divisors(8.0, 1.0, 4.0, 8192, 5e5, 16))


def test_linear_scaling(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, LLAMA_CONFIG | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert facts.rope_scaling == RopeScaling((2.0,) * 8)


@pytest.mark.parametrize("empty", [None, {}, {"rope_type": "default"}])
def test_no_scaling(tmp_path: Path, empty: object) -> None:
    assert facts_of(tmp_path, LLAMA_CONFIG | {"rope_scaling": empty}).rope_scaling is None


@pytest.mark.parametrize(
    ("given", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)]
)
def test_mistral_slides_in_every_layer_unless_null(
    tmp_path: Path, given: dict[str, object], window: int | None
) -> None:
    facts = facts_of(tmp_path, LLAMA_CONFIG | {"architectures": ["MistralForCausalLM"]} | given)
    assert facts.sliding_window == window
    assert facts.sliding_layers == (window is not None,) * 2


def test_qwen2_has_biases_and_slides_from_max_window_layers_on(tmp_path: Path) -> None:
    config = LLAMA_CONFIG | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "max_window_layers": 1}
    facts = facts_of(tmp_path, config)
    assert (facts.qkv_bias, facts.output_bias, facts.sliding_window) == (True, False, None)
    facts = facts_of(tmp_path, config | {"use_sliding_window": True})
    assert (facts.sliding_window, facts.sliding_layers) == (32, (False, True))


def test_layer_types_win_over_the_older_rule(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    config = LLAMA_CONFIG | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": types}
    assert facts_of(tmp_path, config).sliding_layers == (True, False)


def test_gemma3_defaults_fill_a_sparse_text_config(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, GEMMA3_4B)
    assert (facts.num_q_heads, facts.num_kv_heads, facts.head_dim, facts.vocab_size) == (8, 4, 256, 262208)
    assert (facts.rope_theta, facts.rope_local_theta) == (1e6, 1e4)
    assert facts.rope_scaling == RopeScaling((8.0,) * 128)
    assert facts.sliding_window == 1024
    assert [layer for layer in range(34) if not facts.sliding_layers[layer]] == [5, 11, 17, 23, 29]
    assert (facts.tie_embeddings, facts.activation, facts.embedding_scale) == (True, "gelu_tanh", 2560**0.5)
    assert (facts.attention_scale, facts.eos_token_ids, facts.checkpoint_dtype) == (1 / 16, (1, 106), "bfloat16")


def test_gemma3_reads_parameters_per_layer_type(tmp_path: Path) -> None:
    config = {
        "architectures": ["Gemma3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50,
        "layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 64,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    }  # fmt: skip
    facts = facts_of(tmp_path, config)
    assert (facts.rope_theta, facts.rope_local_theta, facts.attention_scale) == (5e5, 2e4, 1 / 8)
    assert facts.rope_scaling == RopeScaling((8.0,) * 8)
    assert facts.sliding_layers == (False, True)


def test_gemma3_pattern_and_old_names(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window_pattern": 2, "rope_local_base_freq": 9e3,
        "rope_theta": 7e5,
    }  # fmt: skip
    facts = facts_of(tmp_path, config)
    assert facts.sliding_layers == (True, False, True, False)
    assert (facts.rope_theta, facts.rope_local_theta) == (7e5, 9e3)


def test_biases_follow_the_configuration(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, LLAMA_CONFIG | {"attention_bias": True, "mlp_bias": True})
    assert (facts.qkv_bias, facts.output_bias, facts.mlp_bias) == (True, True, True)


@pytest.mark.parametrize(("given", "expected"), [({"num_key_value_heads": None}, 4), ({"num_key_value_heads": 1}, 1)])
def test_kv_heads(tmp_path: Path, given: dict[str, object], expected: int) -> None:
    assert facts_of(tmp_path, LLAMA_CONFIG | given).num_kv_heads == expected


def test_llama2_has_as_many_kv_heads_as_query_heads(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "num_key_value_heads"}
    assert facts_of(tmp_path, config).num_kv_heads == 4


ABSENT = "absent"


@pytest.mark.parametrize(("config", "generation", "expected"), [
    (5, [7, 5, 9, 7], (7, 5, 9)), (6, [7, 5], (7, 5)), (3, 60, (60,)), (2, 60, (60,)), (ABSENT, 60, (60,)),
    (None, 60, (60,)), (6, None, (6,)), (6, ABSENT, (6,)), ([6, 8], ABSENT, (6, 8)), (6, -1, ()), (-1, ABSENT, ()),
    ([-1, 4], ABSENT, (4,)), (None, ABSENT, ()), (ABSENT, None, ()), (None, None, ()), (ABSENT, ABSENT, (2,)),
])  # fmt: skip
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_end_tokens_are_those_of_the_first_file_that_names_any(
    tmp_path: Path, name: str, config: object, generation: object, expected: tuple[int, ...]
) -> None:
    own = {} if config == ABSENT else {"eos_token_id": config}
    given = {"temperature": 0.5} | ({} if generation == ABSENT else {"eos_token_id": generation})
    facts = facts_of(tmp_path, LLAMA_CONFIG | {"architectures": [name]} | own, given)
    assert facts.eos_token_ids == expected


@pytest.mark.parametrize(("outer", "inner", "expected"), [
    (ABSENT, ABSENT, (1,)), (5, ABSENT, (5,)), (5, 7, (5,)),
    (ABSENT, 9, (9,)), (ABSENT, None, ()), (None, ABSENT, (1,)),
])  # fmt: skip
def test_end_tokens_of_a_multimodal_file_are_those_of_transformers(
    tmp_path: Path, outer: object, inner: object, expected: tuple[int, ...]
) -> None:
    own = {} if outer == ABSENT else {"eos_token_id": outer}
    text = {} if inner == ABSENT else {"eos_token_id": inner}
    config = {key: value for key, value in GEMMA3_4B.items() if key != "eos_token_id"}
    config["text_config"] = {**GEMMA3_4B["text_config"], **text}  # type: ignore[dict-item]
    assert facts_of(tmp_path, config | own).eos_token_ids == expected


@pytest.mark.parametrize(("given", "expected"), [({}, 1), ({"bos_token_id": -1}, None), ({"bos_token_id": None}, None),
                                                ({"bos_token_id": 0}, 0)])  # fmt: skip
def test_a_bos_of_minus_one_or_null_is_none(tmp_path: Path, given: dict[str, object], expected: int | None) -> None:
    assert facts_of(tmp_path, LLAMA_CONFIG | given).bos_token_id == expected


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("torch_dtype", "torch.bfloat16")])
def test_the_type_of_the_weights_in_either_spelling(tmp_path: Path, key: str, value: str) -> None:
    config = {name: item for name, item in LLAMA_CONFIG.items() if name != "torch_dtype"}
    assert facts_of(tmp_path, config | {key: value}).checkpoint_dtype == "bfloat16"


def test_other_words_for_the_usual(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, LLAMA_CONFIG | {"torch_dtype": "auto", "hidden_act": "swish"})
    assert (facts.checkpoint_dtype, facts.activation) == ("float32", "silu")
    assert facts_of(tmp_path, LLAMA_CONFIG | {"dtype": "auto", "torch_dtype": "float16"}).checkpoint_dtype == "float16"


@pytest.mark.parametrize("given", [
    {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
])  # fmt: skip
def test_theta_may_stand_beside_the_scaling(tmp_path: Path, given: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    facts = facts_of(tmp_path, LLAMA_CONFIG | given)
    right = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert facts.rope_theta == right["rope_theta"] == 5e5
    assert (facts.rope_scaling is not None) == (right["rope_type"] == "linear")


@pytest.mark.parametrize(
    "named", [{"architectures": ["GPT2LMHeadModel"]}, {"architectures": None, "model_type": "gpt2"}]
)
def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path: Path, named: dict[str, object]) -> None:
    message = refusal(tmp_path, LLAMA_CONFIG | named)
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"):
        assert name in message
    assert "GPT2LMHeadModel" in message or "gpt2" in message


def test_no_architecture_at_all(tmp_path: Path) -> None:
    assert "supported architectures" in refusal(tmp_path, {})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1 << 40, 10**400, "64", 1.5, True, [64], {}, None])
def test_absurd_sizes_name_the_key(tmp_path: Path, key: str, value: object) -> None:
    assert key in refusal(tmp_path, LLAMA_CONFIG | {key: value})


@pytest.mark.parametrize(("key", "value"), [
    ("intermediate_size", 0), ("num_key_value_heads", 3), ("num_key_value_heads", 8), ("head_dim", 15),
    ("head_dim", 1 << 20), ("max_position_embeddings", 0), ("rms_norm_eps", -1e-5), ("rms_norm_eps", float("nan")),
    ("rope_theta", float("inf")), ("rope_theta", 0), ("rope_theta", 10**400), ("rope_theta", "1e4"),
    ("tie_word_embeddings", "yes"), ("attention_bias", 1), ("eos_token_id", "</s>"), ("eos_token_id", [-2]),
    ("eos_token_id", [[1]]), ("hidden_act", "relu"), ("hidden_act", 5), ("torch_dtype", "int8"),
    ("architectures", "LlamaForCausalLM"), ("architectures", [1]), ("rope_scaling", "llama3"), ("rope_scaling", [1]),
    ("rope_scaling", {"rope_type": "proportional"}), ("rope_scaling", {"rope_type": "linear"}),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}),
    ("rope_scaling", LLAMA31_SCALING | {"low_freq_factor": 4.0}),
    ("rope_scaling", LLAMA31_SCALING | {"original_max_position_embeddings": 0}), ("partial_rotary_factor", 0.5),
    ("quantization_config", {"quant_method": "gptq"}),
])  # fmt: skip
def test_values_that_cannot_be_served_name_the_key(tmp_path: Path, key: str, value: object) -> None:
    message = refusal(tmp_path, LLAMA_CONFIG | {key: value})
    leaf = next(iter(value)) if isinstance(value, dict) and key != "rope_scaling" else key
    assert key in message or leaf in message or "quantized" in message


@pytest.mark.parametrize("key", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_softcapping_is_refused(tmp_path: Path, key: str) -> None:
    assert key in refusal(tmp_path, {"model_type": "gemma3_text", key: 30.0})
    inner = {**GEMMA3_4B["text_config"], key: 30.0}  # type: ignore[dict-item]
    assert key in refusal(tmp_path, {**GEMMA3_4B, "text_config": inner})


def test_bidirectional_attention_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    key = "use_bidirectional_attention"
    assert key in refusal(tmp_path, {"model_type": "gemma3_text", key: True})
    inner = {**GEMMA3_4B["text_config"], key: True}  # type: ignore[dict-item]
    assert key in refusal(tmp_path, {**GEMMA3_4B, "text_config": inner})


@pytest.mark.parametrize("scaled", [{"rope_type": "linear", "factor": 8.0}, {"type": "dynamic", "factor": 2.0}])
def test_scaled_rope_of_sliding_layers_is_refused(tmp_path: Path, scaled: dict[str, object]) -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": scaled}
    message = refusal(tmp_path, {"model_type": "gemma3_text", "rope_parameters": rope})
    assert "scales the sliding-attention layers" in message


def test_unknown_layer_types_are_refused(tmp_path: Path) -> None:
    config: dict[str, object] = {"model_type": "gemma3_text", "num_hidden_layers": 1}
    assert "chunked" in refusal(tmp_path, config | {"layer_types": ["chunked_attention"]})
    assert "layer_types" in refusal(tmp_path, config | {"layer_types": ["full_attention"] * 2})


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{", '{"a": 1, "a": 2}', "[" * 50_000, '{"hidden_size": 1e999}']
)
def test_configurations_that_are_not_a_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config_facts(tmp_path)


TRANSFORMERS_CASES: dict[str, dict[str, object]] = {
    "LlamaConfig": {}, "MistralConfig": {}, "Qwen2Config": {"use_sliding_window": True, "max_window_layers": 2},
    "Qwen3Config": {}, "Gemma3TextConfig": {},
}  # fmt: skip


@pytest.mark.parametrize("name", list(TRANSFORMERS_CASES))
def test_defaults_agree_with_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name)(**TRANSFORMERS_CASES[name])
    config.save_pretrained(tmp_path)
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    sparse = TRANSFORMERS_CASES[name] | {key: getattr(config, key) for key in kept}
    complete = read_config_facts(tmp_path)
    write_config(tmp_path, sparse)
    facts = read_config_facts(tmp_path)
    assert facts == complete
    assert facts.num_kv_heads == config.num_key_value_heads
    assert facts.max_position == config.max_position_embeddings
    assert facts.rms_norm_eps == config.rms_norm_eps
    assert facts.tie_embeddings == config.tie_word_embeddings
    assert facts.bos_token_id == config.bos_token_id
    assert facts.eos_token_ids == (() if config.eos_token_id is None else (config.eos_token_id,))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert facts.head_dim == head_dim
    types = getattr(config, "layer_types", None)
    if types is not None:
        assert facts.sliding_layers == tuple(kind == "sliding_attention" for kind in types)


def test_a_folder_without_a_configuration_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a model folder: no config\.json"):
        read_config_facts(tmp_path)
