"""Experts in config.json and in tensors: what families mean by default, and every contradiction refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from harness.models.model_files import LLAMA_CONFIG, safetensors_bytes, write_config
from mgpu.protocol.checkpoint.files.tensors import expected_tensors
from mgpu.protocol.checkpoint.read import CheckpointError, read_checkpoint
from mgpu.protocol.checkpoint.tensor_layout.stacked import stored_name
from mgpu.protocol.model.expert_facts import ExpertFacts

QWEN3_MOE = LLAMA_CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16,
}  # fmt: skip
MIXTRAL = LLAMA_CONFIG | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
}  # fmt: skip


def experts_of(folder: Path, config: Mapping[str, object]) -> ExpertFacts:
    write_config(folder, config)
    facts = read_checkpoint(folder, "dummy").facts
    assert facts.experts is not None
    return facts.experts


def write_model(folder: Path, config: Mapping[str, object], changes: Mapping[str, object] | None = None) -> None:
    """Write a folder whose tensors are zeros; ``changes`` replace shapes, and None leaves a tensor out."""
    write_config(folder, config)
    facts = read_checkpoint(folder, "dummy").facts
    shapes: dict[str, object] = {
        stored_name(facts.architecture, name): shape for name, shape in expected_tensors(facts).items()
    }
    shapes |= changes or {}
    kept = {name: shape for name, shape in shapes.items() if shape is not None}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(kept))  # type: ignore[arg-type]


def refusal(folder: Path, load_format: str = "auto") -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, load_format)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_mixtral_has_experts_in_every_layer(tmp_path: Path) -> None:
    assert experts_of(tmp_path, MIXTRAL) == ExpertFacts(4, 2, 96, (True, True), normalizes=True)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_qwen3_moe_in_old_and_new_names(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in QWEN3_MOE.items() if name != "num_experts"} | {key: 4}
    assert experts_of(tmp_path, config) == ExpertFacts(4, 2, 32, (True, True), normalizes=True)


def test_qwen3_moe_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    kept = {"architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    config = {name: value for name, value in QWEN3_MOE.items() if name in kept} | {"intermediate_size": 96}
    assert experts_of(tmp_path, config) == ExpertFacts(128, 8, 768, (True, True), normalizes=False)


@pytest.mark.parametrize(
    ("given", "sparse"),
    [
        ({"mlp_only_layers": [0]}, (False, True, True, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (False, True, False, False)),
        ({"mlp_only_layers": None}, (True, True, True, True)),
    ],
)
def test_dense_layers_among_sparse_ones(tmp_path: Path, given: dict[str, object], sparse: tuple[bool, ...]) -> None:
    assert experts_of(tmp_path, QWEN3_MOE | {"num_hidden_layers": 4} | given).sparse_layers == sparse


@pytest.mark.parametrize("config", [QWEN3_MOE, MIXTRAL], ids=["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    ("key", "value"), [("num_experts_per_tok", 5), ("num_experts_per_tok", 0), ("num_experts_per_tok", True)]
)
def test_a_wrong_number_of_active_experts_is_refused(
    tmp_path: Path, config: dict[str, object], key: str, value: object
) -> None:
    write_config(tmp_path, config | {key: value})
    assert key in refusal(tmp_path, "dummy")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_experts", 0), ("num_experts", "4"), ("num_experts", 1 << 20), ("moe_intermediate_size", -1),
     ("norm_topk_prob", 1), ("decoder_sparse_step", 0), ("mlp_only_layers", [1.5]), ("hidden_act", "relu2")],
)  # fmt: skip
def test_wrong_fields_are_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    write_config(tmp_path, QWEN3_MOE | {key: value})
    assert key in refusal(tmp_path, "dummy")


def test_more_active_experts_than_there_are_names_both_numbers(tmp_path: Path) -> None:
    write_config(tmp_path, QWEN3_MOE | {"num_experts_per_tok": 9})
    assert_has_all(refusal(tmp_path, "dummy"), "num_experts_per_tok is 9", "the 4 experts of num_experts")


def test_a_missing_expert_is_named_as_its_file_would_name_it(tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    write_model(tmp_path, MIXTRAL, {name: None})
    assert_has_all(refusal(tmp_path), "1 of ", "missing", name)


def test_experts_beyond_the_configured_number_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.4.up_proj.weight"
    write_model(tmp_path, QWEN3_MOE, {name: (32, 64)})
    assert_has_all(refusal(tmp_path), "do not belong", "4 experts", name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.layers.0.mlp.gate.weight", (5, 64)), ("model.layers.0.mlp.gate.weight", (4, 32)),
     ("model.layers.1.mlp.experts.2.down_proj.weight", (32, 64))],
)  # fmt: skip
def test_a_router_or_an_expert_of_wrong_shape_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    write_model(tmp_path, QWEN3_MOE, {name: shape})
    assert_has_all(refusal(tmp_path), name, str(list(shape)))


def test_a_router_that_is_missing_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, MIXTRAL, {"model.layers.0.block_sparse_moe.gate.weight": None})
    assert "model.layers.0.block_sparse_moe.gate.weight" in refusal(tmp_path)


@pytest.mark.parametrize("shape", [(3, 64, 64), (4, 64, 32), (4, 32, 64), (256, 64)])
def test_a_stack_of_wrong_shape_is_refused_by_its_own_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write_model(tmp_path, QWEN3_MOE, {name: shape})
    assert_has_all(refusal(tmp_path), name, str(list(shape)), "[4, 64, 64]")


def test_a_stack_is_cut_into_ranges_of_its_bytes(tmp_path: Path) -> None:
    head = "model.layers.0.mlp.experts."
    parts = [f"{expert}.{kind}_proj.weight" for expert in range(4) for kind in ("gate", "up", "down")]
    stacks = {head + "gate_up_proj": (4, 64, 64), head + "down_proj": (4, 64, 32)}
    write_model(tmp_path, QWEN3_MOE, dict.fromkeys([head + part for part in parts]) | stacks)
    tensors = read_checkpoint(tmp_path).tensors
    first = tensors[head + "0.gate_proj.weight"].offset
    up, down = tensors[head + "3.up_proj.weight"], tensors[head + "1.down_proj.weight"]
    assert (up.offset - first, up.shape, up.nbytes) == ((3 * 64 + 32) * 64 * 4, (32, 64), 32 * 64 * 4)
    assert down.offset - tensors[head + "0.down_proj.weight"].offset == 64 * 32 * 4


def test_config_and_index_stay_json(tmp_path: Path) -> None:
    write_model(tmp_path, QWEN3_MOE)
    assert json.loads((tmp_path / "config.json").read_text())["num_experts"] == 4
    assert read_checkpoint(tmp_path).facts.experts is not None
