"""Every family that is served: the page that lists them, what tests cover, and what is refused and why."""

import math
import re
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from harness.models.families import EVERY
from harness.models.model_files import LLAMA_CONFIG, safetensors_bytes, write_config
from mgpu.protocol.checkpoint.huggingface.families import CLASSES, FAMILIES, MODEL_TYPES
from mgpu.protocol.checkpoint.read import CheckpointError, expected_tensors, read_checkpoint
from mgpu.protocol.model.facts import ARCHITECTURES, ModelFacts

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("## Through transformers' code")[0]
ROWS = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (dense|experts) \|", PAGE, re.MULTILINE)


def facts_of(folder: Path, **changes: object) -> ModelFacts:
    write_config(folder, LLAMA_CONFIG | changes)
    return read_checkpoint(folder, "dummy").facts


def refusal(folder: Path, **changes: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        facts_of(folder, **changes)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def test_the_page_lists_what_is_served() -> None:
    assert {name: family for name, family, _ in ROWS} == CLASSES
    assert set(CLASSES.values()) == set(FAMILIES) == set(ARCHITECTURES)
    assert set(MODEL_TYPES.values()) == set(ARCHITECTURES)


@pytest.mark.parametrize(("name", "family", "kind"), ROWS)
def test_the_page_says_which_have_experts(tmp_path: Path, name: str, family: str, kind: str) -> None:
    sizes = {"moe_intermediate_size": 32, "num_experts_per_tok": 1, "hidden_size_per_layer_input": 0}
    facts = facts_of(tmp_path, architectures=[name], full_attention_interval=2, **sizes)
    assert (facts.architecture, facts.experts is not None) == (family, kind == "experts")


def test_every_family_is_compared_with_transformers() -> None:
    names = {re.sub(r"[^a-z0-9]", "", name) for name in EVERY}
    for family in ARCHITECTURES:
        wanted = re.sub(r"[^a-z0-9]", "", family)
        assert any(name.startswith(wanted) for name in names), family


@pytest.mark.parametrize(
    ("name", "key", "value", "part"),
    [
        ("LongcatFlashForCausalLM", "kv_lora_rank", 512, "latent attention of another kind"),
        ("DeepseekV32ForCausalLM", "index_n_heads", 64, "sparse attention"),
        ("MambaForCausalLM", "state_size", 16, "recurrent states"),
        ("JambaForCausalLM", "mamba_d_state", 16, "recurrent states"),
        ("KimiLinearForCausalLM", "linear_num_value_heads", 32, "recurrent states"),
        ("T5ForConditionalGeneration", "is_encoder_decoder", True, "cross attention"),
    ],
)
def test_what_an_unknown_architecture_would_need_is_named(
    tmp_path: Path, name: str, key: str, value: object, part: str
) -> None:
    message = refusal(tmp_path, architectures=[name], **{key: value})
    assert_has_all(message, name, key, part, "supported architectures: LlamaForCausalLM", "GptOssForCausalLM")


def test_a_key_that_is_off_is_no_reason(tmp_path: Path) -> None:
    message = refusal(tmp_path, architectures=["OtherForCausalLM"], is_encoder_decoder=False)
    assert "cross attention" not in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 0},
         "shared_expert_intermediate_size"),
        ({"architectures": ["GptOssForCausalLM"], "swiglu_limit": -7}, "swiglu_limit"),
        ({"architectures": ["GraniteForCausalLM"], "logits_scaling": 0}, "logits_scaling"),
        ({"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": "50"}, "attn_logit_softcapping"),
        ({"architectures": ["LlamaForCausalLM"], "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "no_rope_layers"),
        ({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.1}, "partial_rotary_factor"),
        ({"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "relu"}, "hidden_activation"),
        ({"architectures": ["Olmo3ForCausalLM"], "layer_types": ["linear_attention"] * 2}, "layer_types"),
        ({"architectures": ["Llama4ForCausalLM"], "attention_chunk_size": 0}, "attention_chunk_size"),
        ({"architectures": ["Llama4ForCausalLM"], "num_experts_per_tok": 2}, "supported with 1 of its 16 experts"),
        ({"architectures": ["Llama4ForCausalLM"], "moe_layers": [2]}, "names layer 2, and there are 2"),
        ({"architectures": ["Llama4ForCausalLM"], "layer_types": ["sliding_attention"] * 2}, "chunked_attention"),
        ({"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused_by_name(tmp_path: Path, changes: dict[str, object], key: str) -> None:
    write_config(tmp_path, LLAMA_CONFIG | changes)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"model.norm.weight": (64,)}))
    with pytest.raises(CheckpointError, match=key):
        read_checkpoint(tmp_path, "dummy")


def test_llama_4_scout_has_as_many_parameters_as_it_is_said_to_have(tmp_path: Path) -> None:
    scout = {"hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
             "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 202048,
             "num_local_experts": 16, "interleave_moe_layer_step": 1, "tie_word_embeddings": False}  # fmt: skip
    facts = facts_of(tmp_path, architectures=["Llama4ForCausalLM"], **scout)
    attention = 2 * 5120 * 40 * 128 + 2 * 5120 * 8 * 128
    experts = 17 * 3 * 5120 * 8192 + 16 * 5120
    counts = [math.prod(shape) for shape in expected_tensors(facts).values()]
    assert sum(counts) == 48 * (attention + experts + 2 * 5120) + 2 * 202048 * 5120 + 5120  # 107.8 billion
    assert facts.unrotated_layers == tuple(range(3, 48, 4))
    assert (facts.sliding_window, sum(facts.sliding_layers)) == (8192, 36)


def test_a_shared_expert_without_weights_is_named(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 4, "moe_intermediate_size": 32,
              "shared_expert_intermediate_size": 48}  # fmt: skip
    shapes = dict(expected_tensors(facts_of(tmp_path, **config)))
    del shapes["model.layers.1.mlp.shared_expert.up_proj.weight"]
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(shapes))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.shared_expert\.up_proj\.weight"):
        read_checkpoint(tmp_path)
