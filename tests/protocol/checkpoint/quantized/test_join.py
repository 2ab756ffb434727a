"""Quantized folders: what their headers say is joined to matrices, or refused before anything is loaded."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bench.broken.models import MODELS, write_model
from harness.models.model_files import LLAMA_CONFIG, safetensors_bytes
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, expected_tensors, read_checkpoint

Tensors = dict[str, tuple[str, list[int]]]
"""Type and shape by name."""
DOWN = "model.layers.1.mlp.down_proj"
ROWS, COLUMNS = 64, 96
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32]}
CHANNELS = {"quant_method": "fp8"}


def compressed(form: str = "pack-quantized", **weights: object) -> dict[str, object]:
    chosen = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | weights
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"a": {"weights": chosen}},
    }  # fmt: skip


def gptq(rows: int, columns: int) -> Tensors:
    return {
        "qweight": ("I32", [columns // 8, rows]), "qzeros": ("I32", [columns // 32, rows // 8]),
        "scales": ("F16", [columns // 32, rows]), "g_idx": ("I32", [columns]),
    }  # fmt: skip


def awq(rows: int, columns: int) -> Tensors:
    return {
        "qweight": ("I32", [columns, rows // 8]), "qzeros": ("I32", [columns // 32, rows // 8]),
        "scales": ("F16", [columns // 32, rows]),
    }  # fmt: skip


def blocks(rows: int, columns: int) -> Tensors:
    return {"weight": ("F8_E4M3", [rows, columns]), "weight_scale_inv": ("F32", [rows // 32, columns // 32])}


def channels(rows: int, columns: int) -> Tensors:
    return {"weight": ("F8_E4M3", [rows, columns]), "weight_scale": ("BF16", [rows, 1])}


def words(rows: int, columns: int) -> Tensors:
    return {
        "weight_packed": ("I32", [rows, columns // 8]), "weight_scale": ("BF16", [rows, columns // 32]),
        "weight_shape": ("I64", [2]),
    }  # fmt: skip


WAYS: dict[str, tuple[Mapping[str, object], Callable[[int, int], Tensors]]] = {
    "gptq": (GPTQ, gptq), "awq": (AWQ, awq), "blocks": (BLOCKS, blocks), "channels": (CHANNELS, channels),
    "words": (compressed(), words),
}  # fmt: skip


def write(folder: Path, way: str, config: Mapping[str, object] = {}, **changes: tuple[str, list[int]] | None) -> Path:
    """Write headers of a folder in a format; ``changes`` are of the tensors of one matrix."""
    quantization, store = WAYS[way]
    text = json.dumps(LLAMA_CONFIG | {"quantization_config": dict(quantization) | dict(config)})
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    tensors: Tensors = {}
    for name, shape in expected_tensors(read_checkpoint(folder, "dummy").facts).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = ("F32", list(shape))
            continue
        module = name.removesuffix(".weight")
        stored = dict(store(*shape)) | (changes if module == DOWN else {})
        tensors |= {f"{module}.{end}": each for end, each in stored.items() if each is not None}
    (folder / "config.json").write_text(text)
    shards: dict[str, list[str]] = {}
    for name, (kind, _) in tensors.items():
        shards.setdefault(kind, []).append(name)
    for index, (kind, names) in enumerate(shards.items(), 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name][1] for name in names}, kind))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize(("way", "name"), [
    ("gptq", "GPTQ int4, groups of 32 in act-order"), ("awq", "AWQ int4, groups of 32"),
    ("blocks", "FP8, blocks of 32 x 32"), ("channels", "FP8, a scale per output"),
    ("words", "compressed-tensors int4, groups of 32"),
])  # fmt: skip
def test_matrices_are_joined_under_the_name_of_the_dense_one(tmp_path: Path, way: str, name: str) -> None:
    checkpoint: Checkpoint = read_checkpoint(write(tmp_path, way))
    assert checkpoint.tensors[f"{DOWN}.weight"].shape == (ROWS, COLUMNS)
    assert {checkpoint.facts.formats[1].down.name, checkpoint.facts.formats[0].qkv.name} == {name}
    assert not any("scale" in each or "qzeros" in each for each in checkpoint.tensors)


@pytest.mark.parametrize(("way", "changes", "said"), [
    ("gptq", {"scales": None}, "has no scales beside it"),
    ("gptq", {"qzeros": None}, "has no qzeros beside it"),
    ("gptq", {"g_idx": None}, "has no g_idx beside it, which act-order needs"),
    ("gptq", {"g_idx": ("I32", [95])}, "is I32 [95]; I32 or I64 [96] was expected for 64 x 96 weights"),
    ("gptq", {"scales": ("F16", [2, 64])}, "has shape [2, 64]; for 64 x 96 weights [3, 64] was expected"),
    ("gptq", {"scales": ("I32", [3, 64])}, "is stored as I32; scales are F16"),
    ("gptq", {"qzeros": ("I32", [3, 4])}, "is I32 [3, 4]; I32 [3, 8] was expected"),
    ("gptq", {"qweight": ("I32", [11, 64])}, "has 88 inputs, which are no whole groups of 32"),
    ("gptq", {"qweight": ("I32", [12, 64, 1])}, "has shape [12, 64, 1]; a matrix was expected"),
    ("gptq", {"weight": ("F32", [64, 96])}, "is the same matrix"),
    ("awq", {"qzeros": ("I32", [3, 64])}, "is I32 [3, 64]; I32 [3, 8] was expected"),
    ("awq", {"scales": ("F16", [64, 3])}, "has shape [64, 3]; for 64 x 96 weights [3, 64] was expected"),
    ("blocks", {"weight_scale_inv": ("F32", [2, 2])}, "has shape [2, 2]; for 64 x 96 weights [2, 3] was expected"),
    ("blocks", {"weight_scale_inv": None}, "has no weight_scale or weight_scale_inv beside it"),
    ("blocks", {"weight": ("F8_E5M2", [64, 96])}, "is stored as F8_E5M2"),
    ("channels", {"weight_scale": ("BF16", [63, 1])}, "has shape [63, 1]; for 64 x 96 weights [64, 1]"),
    ("channels", {"weight": ("I8", [64, 96])}, "is stored as I8, which is not what its scheme says"),
    ("words", {"weight_scale": ("BF16", [64, 4])}, "has shape [64, 4]; for 64 x 96 weights [64, 3] was expected"),
    ("words", {"weight_packed": None, "qweight": ("I32", [12, 64])}, "is not what compressed-tensors stores"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused_with_tensor_and_file(
    tmp_path: Path, way: str, changes: dict[str, tuple[str, list[int]] | None], said: str
) -> None:
    text = refusal(write(tmp_path, way, **changes))
    assert said in text
    assert DOWN in text
    assert ".safetensors" in text
    assert text.endswith(
        "Download the folder again, or use the original weights with --quant 8, 4 or fp8, or a GGUF file"
    )


@pytest.mark.parametrize(("way", "config", "said"), [
    ("gptq", {"bits": 3}, "bits is 3; supported: 4, 8"),
    ("gptq", {"group_size": 0}, "group_size is 0"),
    ("gptq", {"group_size": "x"}, "group_size must be an integer"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported: gptq, gptq_v2"),
    ("gptq", {"dynamic": {"+:(a+)+b": {"bits": 8}}}, "is too intricate"),
    ("gptq", {"dynamic": {"+:(": {"bits": 8}}}, "is not valid"),
    ("awq", {"version": "gemv"}, "version is 'gemv'; supported: gemm"),
    ("awq", {"zero_point": False}, "zero_point is false"),
    ("awq", {"bits": 8}, "bits is 8; supported: 4"),
    ("blocks", {"weight_block_size": [0, 32]}, "weight_block_size is [0, 32]"),
    ("blocks", {"fmt": "e5m2"}, "fmt is 'e5m2'; supported: e4m3"),
    ("words", compressed("marlin-24"), "as 'marlin-24'; supported: int of 4 and 8 bits"),
    ("words", compressed("nvfp4-pack-quantized", type="float"), "'float' of 4 bits as 'nvfp4-pack-quantized'"),
    ("words", compressed(strategy="token"), "strategy is 'token'"),
    ("words", {"config_groups": {}}, "config_groups is missing"),
    ("words", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format is 'sparse-24-bitmask'"),
    ("words", {"config_groups": {"a": {"targets": ["re:.*down_proj"], "weights": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}},
     "is stored as I32, and no quantization_config in config.json says how"),
    ("words", {"quant_method": "bitsandbytes"}, "(bitsandbytes), which only the library bitsandbytes can read"),
    ("words", {"quant_method": "hqq"}, "(hqq), which is not supported; supported: fp8"),
    ("words", {"quant_method": "mxfp4"}, "(mxfp4), which is not supported"),
])  # fmt: skip
def test_unknown_methods_and_versions_are_refused_by_name(
    tmp_path: Path, way: str, config: dict[str, object], said: str
) -> None:
    text = refusal(write(tmp_path, way, config))
    assert said in text
    assert "quantization_config" in text or "--quant" in text


def test_stored_zero_points_count_though_the_configuration_calls_the_format_symmetric(tmp_path: Path) -> None:
    zeros = {"weight_zero_point": ("I32", [8, 3])}
    checkpoint = read_checkpoint(write(tmp_path, "words", compressed(symmetric=True), **zeros))
    assert checkpoint.tensors[f"{DOWN}.weight"].packed.zeros is not None
    said = refusal(write(tmp_path, "words", weight_zero_point=("I32", [8, 4])))
    assert "weight_zero_point' is I32 [8, 4]; I32 [8, 3] was expected" in said


def test_packed_weights_without_a_configuration_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    assert "is stored as I32, and no quantization_config in config.json says how" in refusal(tmp_path)


def test_packed_weights_of_bitsandbytes_without_a_configuration_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    shapes = expected_tensors(read_checkpoint(tmp_path, "dummy").facts)
    outputs, inputs = shapes.pop(f"{DOWN}.weight")
    packed = {f"{DOWN}.weight": (outputs * inputs // 2, 1), f"{DOWN}.weight.absmax": (outputs * inputs // 64,)}
    for index, (kind, tensors) in enumerate((("F32", shapes), ("U8", packed)), 1):
        (tmp_path / f"model-0000{index}-of-00002.safetensors").write_bytes(safetensors_bytes(tensors, kind))
    said = refusal(tmp_path)
    assert f"tensor '{DOWN}.weight' is stored as U8, and no quantization_config in config.json says how" in said


@pytest.mark.parametrize(("missing", "left"), [("_blocks", "_scales"), ("_scales", "_blocks")])
def test_mxfp4_without_one_of_its_parts_is_refused_by_the_name_of_the_other(
    tmp_path: Path, missing: str, left: str
) -> None:
    stem = "model.layers.0.mlp.experts.down_proj"
    said = refusal(write_model(MODELS["mxfp4"].with_tensor(stem + missing, None), tmp_path))
    assert f"tensor '{stem}{left}' has no" in said
    assert "download the folder again" in said
