"""Gemma 4's config.json: heads of layers with full attention in both spellings, and what is refused."""

import json
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from mgpu.protocol.checkpoint.read import CheckpointError, expected_tensors, read_checkpoint
from mgpu.protocol.model.attention_facts import FullHeads
from mgpu.protocol.model.facts import ModelFacts

CONFIG: dict[str, object] = {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 100,
    "global_head_dim": 32, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0, "sliding_window": 8,
}  # fmt: skip
WIDE = {"head_dim": 32, "num_key_value_heads": 2}


def facts_of(folder: Path, **changes: object) -> ModelFacts:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return read_checkpoint(folder, "dummy").facts


def test_layers_have_the_heads_of_their_kind(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    assert facts.sliding_layers == (True,) * 5 + (False,)
    assert facts.full_heads == FullHeads(num_kv=2, head_dim=32, rotated_size=8, keys_are_values=True)
    assert (facts.rope_theta, facts.rope_local_theta, facts.attention_scale) == (1e6, 1e4, 1.0)
    shapes = expected_tensors(facts)
    assert shapes["model.layers.0.self_attn.v_proj.weight"] == (4 * 16, 64)
    assert shapes["model.layers.5.self_attn.q_proj.weight"] == (8 * 32, 64)
    assert shapes["model.layers.5.self_attn.k_proj.weight"] == (2 * 32, 64)
    assert "model.layers.5.self_attn.v_proj.weight" not in shapes
    assert shapes["model.layers.5.layer_scalar"] == (1,)


def test_kv_heads_of_full_layers_count_only_where_keys_are_values(tmp_path: Path) -> None:
    heads = facts_of(tmp_path, attention_k_eq_v=False).full_heads
    assert heads is not None
    assert (heads.num_kv, heads.head_dim, heads.keys_are_values) == (4, 32, False)


def test_sizes_of_each_layer_mean_the_same(tmp_path: Path) -> None:
    plain = facts_of(tmp_path)
    written = {"global_head_dim": ..., "num_global_key_value_heads": ..., "per_layer_config": {"5": WIDE}}
    assert facts_of(tmp_path, **written) == plain


def test_the_last_layer_always_has_full_attention(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention"] * 3
    assert facts_of(tmp_path, layer_types=types).sliding_layers == (False, True, False, True, False, False)


def test_a_stretched_rotation_divides_the_speeds_that_turn(tmp_path: Path) -> None:
    full = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 5e5, "factor": 4.0}
    facts = facts_of(tmp_path, rope_parameters={"full_attention": full, "sliding_attention": {"rope_theta": 2e4}})
    assert facts.full_heads is not None
    assert facts.rope_scaling is not None
    assert (facts.full_heads.rotated_size, facts.rope_theta, facts.rope_local_theta) == (16, 5e5, 2e4)
    assert facts.rope_scaling.divisors == (4.0,) * 8


def test_the_last_layers_read_the_cache_of_the_last_one_of_their_kind(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention"] * 2
    facts = facts_of(tmp_path, layer_types=types, num_kv_shared_layers=3, use_double_wide_mlp=True)
    assert facts.cache_sources == (0, 1, 2, 0, 2, 0)
    shapes = expected_tensors(facts)
    assert shapes["model.layers.4.mlp.up_proj.weight"] == (2 * 96, 64)
    assert shapes["model.layers.2.mlp.up_proj.weight"] == (96, 64)
    assert not [
        name for name in shapes if name.startswith(("model.layers.4.self_attn.k", "model.layers.5.self_attn.v"))
    ]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"global_head_dim": 33}, ("global_head_dim is 33", "even")),
        ({"num_global_key_value_heads": 3}, ("num_global_key_value_heads is 3", "8 query heads")),
        ({"layer_types": ["linear_attention"] * 6}, ("layer_types", "linear_attention", "supported")),
        ({"layer_types": ["full_attention"] * 4}, ("layer_types has 4 entries, expected 6",)),
        ({"sliding_window": None}, ("sliding_window is null",)),
        ({"per_layer_config": {"5": WIDE, "1": WIDE}}, ("layer 1", "2 KV heads of 32", "4 of 16")),
        ({"per_layer_config": {"6": WIDE}}, ("per_layer_config", "'6'", "6 layers")),
        ({"rope_parameters": {"rope_theta": 1e4}}, ("rope_parameters", "full_attention and sliding_attention")),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_theta": 1e4}}},
         ("rope_type is 'yarn'", "proportional")),
        ({"rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 1.5},
                              "sliding_attention": {"rope_theta": 1e4}}},
         ("partial_rotary_factor is 1.5", "48 of 32 components")),
        ({"use_bidirectional_attention": "all"}, ("use_bidirectional_attention is 'all'",)),
        ({"attention_bias": True}, ("attention_bias",)),
        ({"enable_moe_block": True}, ("num_experts is missing",)),
        ({"num_kv_shared_layers": 1, "layer_types": ["sliding_attention"] * 6},
         ("num_kv_shared_layers is 1", "of 6 layers 5 have caches", "full_attention")),
        ({"num_kv_shared_layers": 7}, ("num_kv_shared_layers is 7", "0 have caches")),
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99},
         ("vocab_size_per_layer_input is 99", "100 of vocab_size")),
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8},
         ("top_k_experts is 5", "4 experts")),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_numbers(
    tmp_path: Path, changes: dict[str, object], parts: tuple[str, ...]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        facts_of(tmp_path, **changes)
    assert_has_all(str(caught.value), *parts)
