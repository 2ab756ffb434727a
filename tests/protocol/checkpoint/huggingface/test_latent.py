"""Configurations with latent attention: what is read, and what is refused with its numbers before anything starts."""

import json
import math
from pathlib import Path

import pytest

from harness.models.model_files import safetensors_bytes
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import CheckpointError, expected_tensors, read_checkpoint
from mgpu.protocol.checkpoint.tensor_layout.stacked import stored_name
from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.expert_facts import ExpertChoice
from mgpu.protocol.model.facts import ModelFacts

SMALL = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "vocab_size": 50, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
    "topk_group": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
V2 = {"architectures": ["DeepseekV2ForCausalLM"]}


def facts_of(folder: Path, **changes: object) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps(SMALL | changes))
    return read_config_facts(folder)


@pytest.mark.parametrize(
    ("name", "latent", "choice", "layers"),
    [
        ("DeepseekV3ForCausalLM", (512, 64, 128, 128, 1536, True), ("sigmoid", 8, 4, 2, True, 2.5), (61, 58)),
        ("DeepseekV2ForCausalLM", (512, 64, 128, 128, 1536, True), None, (32, 32)),
        ("Mistral4ForCausalLM", (256, 64, 64, 128, 1024, True), ("softmax", 1, 1, 2, False, 1.0), (36, 36)),
    ],
)
def test_defaults_are_those_of_transformers(
    tmp_path: Path, name: str, latent: tuple[int, ...], choice: tuple[object, ...] | None, layers: tuple[int, int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name], "num_experts_per_tok": 6}))
    facts = read_config_facts(tmp_path)
    growth = (0.1, 8192) if name.startswith("Mistral") else (0.0, 1)
    assert facts.latent == LatentFacts(*latent, *growth)
    assert (facts.num_kv_heads, facts.head_dim, facts.rotated_size) == (1, latent[0] + 64, 0)
    assert facts.experts is not None
    assert facts.experts.choice == (None if choice is None else ExpertChoice(*choice))
    assert (facts.num_layers, sum(facts.experts.sparse_layers)) == layers


def test_the_scale_of_scores_grows_with_yarn_as_its_multiplier_says(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.5}
    assert facts_of(tmp_path).attention_scale == pytest.approx(20**-0.5)
    assert facts_of(tmp_path, rope_scaling=yarn).attention_scale == pytest.approx(20**-0.5)
    facts = facts_of(tmp_path, rope_scaling=yarn | {"mscale_all_dim": 0.707})
    sharper = 0.1 * 0.707 * math.log(40) + 1
    assert facts.attention_scale == pytest.approx(20**-0.5 * sharper**2)
    assert facts.rope_scaling is not None
    assert facts.rope_scaling.attention_factor == pytest.approx((0.1 * 0.5 * math.log(40) + 1) / sharper)
    assert facts.max_position == 163840


def test_queries_have_one_projection_where_their_rank_is_null(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, q_lora_rank=None)
    assert facts.latent is not None
    assert facts.latent.query_rank == 0
    assert expected_tensors(facts)["model.layers.0.self_attn.q_proj.weight"] == (4 * 20, 32)


def test_kimi_k2_is_read_by_its_type_and_by_its_class(tmp_path: Path) -> None:
    assert facts_of(tmp_path, architectures=None, model_type="kimi_k2").architecture == "deepseek_v3"
    assert facts_of(tmp_path, model_type="kimi_k2").architecture == "deepseek_v3"


def test_the_text_model_of_a_multimodal_mistral_is_read(tmp_path: Path) -> None:
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": SMALL | {"model_type": "mistral4"}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    facts = read_config_facts(tmp_path)
    assert (facts.architecture, facts.max_position) == ("mistral4", 1048576)
    assert facts.latent is not None
    assert (facts.latent.query_growth, facts.latent.growth_from) == (0.1, 8192)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topk_method": "best_of_all"}, "topk_method is 'best_of_all'; deepseek_v3 is supported with noaux_tc"),
        (V2 | {"topk_method": "noaux_tc"}, "deepseek_v2 is supported with greedy, group_limited_greedy"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; deepseek_v3 is supported with 'sigmoid'"),
        ({"n_group": 3}, "n_group is 3, which does not divide the 8 experts"),
        ({"n_group": 8}, "n_group is 8: groups of 1 of 8 experts; 2 are needed"),
        ({"topk_group": 5}, "topk_group is 5, more than the 4 groups"),
        ({"topk_group": 0}, "topk_group is 0"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5, more than the 2 \* 2 experts of topk_group groups"),
        ({"num_experts_per_tok": 9}, "is 9, more than the 8 experts of n_routed_experts"),
        (V2 | {"topk_method": "group_limited_greedy", "n_group": None}, "n_group is missing"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; supported: 1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"kv_lora_rank": "wide"}, "kv_lora_rank must be an integer"),
        ({"q_lora_rank": -1}, "q_lora_rank is -1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; rotary embeddings need an even number"),
        ({"v_head_dim": 1 << 20}, "v_head_dim is 1048576"),
        ({"attention_bias": True}, "attention_bias is true, which is not supported for deepseek_v3"),
        (V2 | {"mlp_bias": True}, "mlp_bias is true, which is not supported for deepseek_v2"),
        ({"rope_scaling": {"type": "yarn", "mscale_all_dim": 1.0}}, "factor is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_cannot_be_served_is_refused_with_numbers(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        facts_of(tmp_path, **changes)


def write_tensors(folder: Path, facts: ModelFacts, without: str = "", **further: tuple[int, ...]) -> None:
    shapes = {stored_name(facts.architecture, name): shape for name, shape in expected_tensors(facts).items()}
    shapes = {name: shape for name, shape in shapes.items() if not without or without not in name} | further
    (folder / "model.safetensors").write_bytes(safetensors_bytes(shapes))


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.0.self_attn.kv_b_proj.weight", "model.layers.2.self_attn.q_a_layernorm.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.shared_experts.up_proj.weight", "model.layers.1.mlp.experts.7.down_proj.weight",
    ],
)  # fmt: skip
def test_missing_tensors_are_named_as_they_are_stored(tmp_path: Path, missing: str) -> None:
    write_tensors(tmp_path, facts_of(tmp_path), without=missing)
    with pytest.raises(CheckpointError, match=f"tensors are missing: {missing}"):
        read_checkpoint(tmp_path)


def test_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    write_tensors(tmp_path, facts_of(tmp_path), **{name: (4 * 22, 25)})
    with pytest.raises(CheckpointError, match=r"kv_b_proj.weight' has shape \[88, 25\].* asks for \[88, 24\]"):
        read_checkpoint(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out_with_a_word(tmp_path: Path) -> None:
    further = {"model.layers.3.eh_proj.weight": (32, 64), "model.layers.3.self_attn.o_proj.weight": (32, 40)}
    facts = facts_of(tmp_path, num_nextn_predict_layers=1)
    assert facts.left_out == ("its multi-token head",)
    write_tensors(tmp_path, facts, **further)
    assert not any("layers.3." in name for name in read_checkpoint(tmp_path).tensors)
    facts_of(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match="2 tensors do not belong to a deepseek_v3 model of 3 layers"):
        read_checkpoint(tmp_path)
