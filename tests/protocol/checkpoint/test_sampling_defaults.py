"""How the makers of a model want it sampled: what its files say, as transformers and llama.cpp read them."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.models.model_files import LLAMA_METADATA, f32, gguf_bytes, u32
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.checkpoint.sampling_defaults import read_sampling_defaults
from mgpu.protocol.model.facts import ModelSource
from mgpu.protocol.model.sampling import SamplingDefaults


def read(folder: Path, values: object) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_sampling_defaults(ModelSource(str(folder), "safetensors"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
         SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)),
        ({"do_sample": True}, SamplingDefaults(temperature=1.0)),
        ({"do_sample": True, "top_k": 64, "top_p": None, "eos_token_id": [1]}, SamplingDefaults(1.0, 64)),
        ({"do_sample": True, "temperature": 1, "min_p": 0.05, "repetition_penalty": 1.1},
         SamplingDefaults(1.0, min_p=0.05, repetition_penalty=1.1)),
        ({"temperature": 0.6}, SamplingDefaults()),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.05},
         SamplingDefaults(repetition_penalty=1.05)),
        ({}, SamplingDefaults()),
    ],
)  # fmt: skip
def test_a_folder_is_read_as_transformers_does(tmp_path: Path, values: Any, expected: SamplingDefaults) -> None:
    assert read(tmp_path, values) == expected


def test_a_folder_without_the_file_says_nothing(tmp_path: Path) -> None:
    found = read_sampling_defaults(ModelSource(str(tmp_path), "safetensors"))
    assert found == SamplingDefaults()
    assert str(found) == "temperature 0 (greedy)"


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_k": "many"}, {"top_k": 1.5}, {"temperature": float("nan")}]
)
def test_values_that_no_request_may_have_name_the_way_out(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="generation_config"):
        read(tmp_path, {"do_sample": True, **wrong})


def test_a_gguf_file_says_it_in_its_metadata(tmp_path: Path) -> None:
    said = {
        "general.sampling.temp": f32(0.5),
        "general.sampling.top_k": u32(40),
        "general.sampling.penalty_repeat": f32(1),
    }
    for name, metadata, expected in (
        ("says", said, SamplingDefaults(0.5, 40, repetition_penalty=1.0)),
        ("silent", {}, SamplingDefaults()),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(gguf_bytes({**LLAMA_METADATA, **metadata}, {}))
        assert read_sampling_defaults(ModelSource(str(path), "gguf")) == expected


def test_the_text_has_the_numbers() -> None:
    assert str(SamplingDefaults(0.6, 20, 0.95)) == "temperature 0.6, top_k 20, top_p 0.95"
