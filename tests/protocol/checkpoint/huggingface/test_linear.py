"""Configurations with linear attention: what is read, and what is refused with its numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import CheckpointError, read_checkpoint
from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.protocol.model.facts import ModelFacts

SMALL = {
    "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


def facts_of(folder: Path, **changes: object) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps(SMALL | changes))
    return read_config_facts(folder)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3_5MoeForConditionalGeneration"]}')
    facts = read_config_facts(tmp_path)
    every_fourth = tuple(layer % 4 != 3 for layer in range(40))
    assert facts.linear == LinearFacts(every_fourth, 16, 32, 128, 128, 4)
    assert (facts.rotated_size, facts.head_dim, facts.attention_gate, facts.qk_norm) == (64, 256, True, True)
    assert facts.experts is not None
    assert (facts.experts.count, facts.experts.active, facts.experts.shared_gate) == (256, 8, True)


def test_the_text_model_of_a_multimodal_folder_is_read(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": SMALL | {"rope_parameters": rope}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    facts = read_config_facts(tmp_path)
    assert (facts.architecture, facts.rope_theta, facts.rotated_size) == ("qwen3_5", 1e7, 4)


def test_the_multi_token_head_is_left_out_with_a_word(tmp_path: Path) -> None:
    assert facts_of(tmp_path, mtp_num_hidden_layers=1).left_out == ("its multi-token head",)
    assert facts_of(tmp_path, mtp_num_hidden_layers=0).left_out == facts_of(tmp_path).left_out == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_num_value_heads": 5}, "is 5, not a multiple of the 2 key heads"),
        ({"linear_num_key_heads": 0}, "linear_num_key_heads is 0"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
        ({"linear_key_head_dim": "wide"}, "must be an integer"),
        ({"full_attention_interval": 5}, "is 5: none of the 4 layers would have attention"),
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"layer_types": ["linear_attention"] * 4}, "has 4 linear_attention and no full_attention"),
        ({"layer_types": ["mamba"] * 4}, "has 'mamba'; supported here: linear_attention, full_attention"),
        ({"layer_types": ["full_attention"]}, "expected 4"),
        ({"attention_bias": True}, "attention_bias is true, which is not supported for qwen3_5"),
        ({"partial_rotary_factor": 0.1}, "is 0.1: 1.6 of 16 components cannot be rotated"),
    ],
)
def test_what_cannot_be_served_is_refused_with_numbers(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words.replace("*", r"\*")):
        facts_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("linear_attn.in_proj_qkv.weight", (63, 32), r"shape \[63, 32\], the configuration asks for \[64, 32\]"),
        ("linear_attn.conv1d.weight", (64, 4), r"shape \[64, 4\], the configuration asks for \[64, 1, 4\]"),
        ("linear_attn.A_log", (3,), r"shape \[3\], the configuration asks for \[4\]"),
    ],
)
def test_states_of_another_shape_are_refused_under_their_stored_names(
    tmp_path: Path, name: str, shape: tuple[int, ...], words: str
) -> None:
    facts_of(tmp_path)
    save_file({f"model.layers.0.{name}": torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words if len(shape) > 1 else "are missing"):
        read_checkpoint(tmp_path)


def test_missing_projections_are_named_as_they_are_stored(tmp_path: Path) -> None:
    for family, stored in (("Qwen3_5ForCausalLM", "in_proj_qkv"), ("Qwen3NextForCausalLM", "in_proj_qkvz")):
        facts_of(tmp_path, architectures=[family], num_experts=0)
        save_file({"model.embed_tokens.weight": torch.zeros(50, 32)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"model.layers.0.linear_attn.{stored}.weight"):
            read_checkpoint(tmp_path)
