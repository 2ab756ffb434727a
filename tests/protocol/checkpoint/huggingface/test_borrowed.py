"""Which models transformers' code runs, and what of them is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.huggingface.borrowed import BORROWED, UNSPLIT, layer_elements, without_ignored
from mgpu.protocol.checkpoint.huggingface.borrowed_experts import EXPERT_KEYS, with_stored_experts
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.huggingface.families import CLASSES
from mgpu.protocol.checkpoint.read import CheckpointError

CONFIG = {
    "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 128,
    "eos_token_id": 7,
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_family_without_own_code_is_borrowed(tmp_path: Path) -> None:
    facts = read_config_facts(write(tmp_path))
    assert facts.borrowed is not None
    assert not facts.borrowed.can_split
    assert (facts.num_kv_heads, facts.head_dim, facts.eos_token_ids) == (4, 16, (7,))


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, "own", "the architecture is 'StableLmForCausalLM'; supported"),
        ({"architectures": ["MixtralForCausalLM"]}, "transformers", "--model-code transformers: the architecture is"),
        ({"model_type": "llama"}, "auto", "model_type is 'llama'; StableLmForCausalLM needs 'stablelm'"),
        ({"intermediate_size": None}, "auto", "intermediate_size is missing"),
        ({"num_key_value_heads": 3}, "auto", "is 3, which does not divide 4 query heads"),
        ({"quantization_config": {"quant_method": "awq"}}, "auto", "weights are quantized already"),
    ],
)
def test_what_cannot_be_borrowed_says_why(tmp_path: Path, changes: dict[str, Any], code: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        read_config_facts(write(tmp_path, **changes), code=code)
    assert words in str(refused.value)


def test_a_tensor_of_a_layer_too_many_and_a_layer_without_tensors_are_refused() -> None:
    def entry(layer: int) -> dict[str, TensorEntry]:
        name = f"model.layers.{layer}.norm.weight"
        return {name: TensorEntry(name, "F32", (8, 2), "file", 0, 64)}

    assert layer_elements("here", 2, entry(0) | entry(1)) == (16, 16)
    with pytest.raises(CheckpointError, match="is of no layer: the configuration says 2"):
        layer_elements("here", 2, entry(0) | entry(2))
    with pytest.raises(CheckpointError, match="layer 1 of 2 has no tensors"):
        layer_elements("here", 2, entry(0))


MOE = {
    "architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "n_routed_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 24,
}  # fmt: skip
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


ROUTER = "model.layers.1.mlp.gate.weight"
SHARED = "model.layers.1.mlp.shared_experts.{}_proj.weight"


def experts_of(count: int, **changes: tuple[int, ...]) -> dict[str, TensorEntry]:
    names = [EXPERT.format(expert, part) for expert in range(count) for part in ("gate", "up", "down")]
    shapes = {name: (64, 24) if "down" in name else (24, 64) for name in names} | {ROUTER: (2, 64)} | changes
    return {name: TensorEntry(name, "F32", shape, "file", 0, 64) for name, shape in shapes.items() if shape}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 3}, "num_experts_per_tok is 3, more than the 2 experts of n_routed_experts"),
        ({"n_routed_experts": 1 << 13}, "n_routed_experts is 8192"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"hidden_act": "relu2"}, "hidden_act is 'relu2'; experts are supported with silu"),
        ({"n_group": 3}, "n_group is 3, which does not divide 2 experts"),
        ({"n_group": 2, "topk_group": 3}, "topk_group is 3, more than the 2 groups of n_group"),
        ({"n_group": 2, "num_experts_per_tok": 2}, "topk_group is 1: so many groups have 1 experts, and a token 2"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_scaling rope_type is 'spiral'; supported: default, linear"),
        ({"rope_parameters": {"full_attention": {"rope_type": "x"}}}, "rope_parameters rope_type is 'x'; supported"),
    ],
)
def test_experts_that_cannot_be_borrowed_say_why(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        read_config_facts(write(tmp_path, **MOE | changes))
    assert words in str(refused.value)


def test_the_stored_tensors_say_which_layers_have_experts(tmp_path: Path) -> None:
    facts = read_config_facts(write(tmp_path, **MOE))
    experts = with_stored_experts("here", facts, experts_of(2)).experts
    assert experts is not None
    assert experts.sparse_layers == (False, True)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (experts_of(1), "tensor 'model.layers.1.mlp.experts.1.gate_proj.weight' is missing"),
        (experts_of(2, **{EXPERT.format(0, "up"): ()}), "tensor 'model.layers.1.mlp.experts.0.up_proj.weight' is miss"),
        (experts_of(3), "experts.2.gate_proj.weight': the configuration says 2 experts"),
        (experts_of(2, **{EXPERT.format(1, "down"): (24, 64)}), "has shape [24, 64], the configuration asks for [64, "),
        ({}, "no layer has experts, and the configuration says 2"),
        (experts_of(2, **{ROUTER: ()}), "tensor 'model.layers.1.mlp.gate.weight' is missing"),
        (experts_of(2, **{ROUTER: (3, 64)}), "has shape [3, 64], the configuration asks for [2, 64]"),
        (experts_of(2), "tensor 'model.layers.1.mlp.shared_experts.gate_proj.weight' is missing"),
        (experts_of(2, **{SHARED.format("gate"): (9, 64)}), "has shape [9, 64], the configuration asks for [24, 64]"),
    ],
)
def test_missing_and_odd_experts_are_refused(tmp_path: Path, tensors: dict[str, TensorEntry], words: str) -> None:
    facts = read_config_facts(write(tmp_path, **MOE, n_shared_experts=1))
    with pytest.raises(CheckpointError) as refused:
        with_stored_experts("here", facts, tensors)
    assert words in str(refused.value)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    facts = read_config_facts(write(tmp_path, **MOE, num_nextn_predict_layers=1))
    names = [f"model.layers.{layer}.norm.weight" for layer in range(4)]
    entries = {name: TensorEntry(name, "F32", (8,), "file", 0, 32) for name in names}
    assert [*without_ignored(facts, entries)] == [names[0], names[1], names[3]]


def test_the_page_lists_all_borrowed_families() -> None:
    page = (Path(__file__).parents[4] / "docs" / "models.md").read_text()
    section = page.split("## Through transformers' code")[1]
    for name, kind in BORROWED.items():
        experts = "experts" if kind in EXPERT_KEYS else "dense"
        assert f"| `{name}` | `{kind}` | {experts} |{' no' if kind in UNSPLIT else ''}" in section
    assert not set(BORROWED) & set(CLASSES)
