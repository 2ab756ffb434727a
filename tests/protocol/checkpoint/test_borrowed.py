"""Which models transformers' code runs, and what of them is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mgpu.protocol.checkpoint.borrowed import BORROWED, UNSPLIT, layer_elements
from mgpu.protocol.checkpoint.families import CLASSES
from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.huggingface import read_config_facts
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


def test_the_page_lists_all_borrowed_families() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    section = page.split("## Through transformers' code")[1]
    for name, kind in BORROWED.items():
        assert f"| `{name}` | `{kind}` |{' no' if kind in UNSPLIT else ''}" in section
    assert not set(BORROWED) & set(CLASSES)
