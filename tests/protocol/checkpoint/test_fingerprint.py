"""Copies of a model have the same print wherever they lie; another model has another one."""

import json
import shutil
from pathlib import Path

import pytest

from harness.models.model_files import write_llama_folder
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.checkpoint.fingerprint import model_print


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    write_llama_folder(tmp_path / "a")
    return tmp_path / "a"


def prints(folder: Path) -> tuple[str, str]:
    found = model_print(str(folder))
    assert found.path == str(folder)
    return found.config, found.tensors


def test_a_copy_has_the_same_print(model: Path) -> None:
    copy = model.parent / "copy"
    shutil.copytree(model, copy)
    assert prints(copy) == prints(model)


def test_other_weights_of_the_same_shape_are_told_apart(model: Path) -> None:
    before = prints(model)
    file = next(model.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header:] = bytes(byte ^ 1 for byte in data[header:])
    file.write_bytes(data)
    config, tensors = prints(model)
    assert config == before[0]
    assert tensors != before[1]


def test_another_configuration_is_told_apart(model: Path) -> None:
    before = prints(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 123456.0}))
    assert prints(model)[0] != before[0]


def test_a_folder_without_weights_has_the_configuration_only(model: Path) -> None:
    config, _ = prints(model)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    assert prints(model) == (config, "")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        model_print(str(tmp_path))
