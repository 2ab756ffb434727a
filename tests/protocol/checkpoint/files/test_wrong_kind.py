"""Files and folders that are not what their names promise: the message says what they are."""

from functools import partial
from pathlib import Path

import pytest

from harness.models.random_model import write_random_model
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.tokenizer import load_codec
from mgpu.protocol.checkpoint.files.gguf_file import read_gguf
from mgpu.protocol.checkpoint.files.safetensors_file import read_safetensors
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, read_json_object
from mgpu.protocol.checkpoint.read import read_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483464192\n"


@pytest.mark.parametrize(("data", "said"), [
    (LFS, "is a pointer of Git LFS"), (b"/annex/objects/MD5-s1--x", "git annex get"), (b"", "is empty"),
    (b"<!DOCTYPE html><html>", "is a web page"), (b"\n <HTML lang=en>", "is a web page"),
    (b"\x1f\x8b\x08" + b"..", "gzip"), (b"PK\x03\x04" + b"..", "can run code"),
])  # fmt: skip
@pytest.mark.parametrize(
    "read",
    [read_json_object, read_safetensors, partial(read_gguf, with_arrays=False)],
    ids=["json", "safetensors", "gguf"],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, read: object, data: bytes, said: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"^{file}: not .*: it .*{said}"):
        read(file)  # type: ignore[operator]
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(TokenizerError, match=said):
        load_codec(str(tmp_path), "safetensors")


def test_a_gguf_file_under_another_name_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"GGUF\x03\0\0\0" + bytes(80))
    with pytest.raises(CheckpointError, match=r"is a GGUF file: name it so that it ends in \.gguf"):
        read_safetensors(file)


@pytest.mark.parametrize(("files", "said"), [
    (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
    (["a-Q8.gguf"], "it holds a-Q8.gguf: name the file, /.*"),
    (["b-Q4.gguf", "a-Q8.gguf"], "a-Q8.gguf and 1 more .gguf: name the file, such as .*a-Q8.gguf"),
    (["model_index.json"], "images"), (["params.json", "consolidated.00.pth"], "form of their makers"),
    (["refs/main", "snapshots/0123/config.json"], "snapshots/0123: name that folder"),
    (["8B/config.json", "README.md"], "8B: name that folder"), (["README.md"], "$"), ([], "$"),
])  # fmt: skip
def test_a_folder_without_config_says_what_it_is(tmp_path: Path, files: list[str], said: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=rf"not a model folder: no config.json.*{said}"):
        read_checkpoint(str(tmp_path))


def test_a_checked_out_repository_without_its_large_files_is_named(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path)
    (folder / "model.safetensors").write_bytes(LFS)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_checkpoint(str(folder))
