"""Panics of the tokenizer library: each costs one request, in the poll loop, in threads and while loading."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from harness.servers.gateway_process import GatewayProcess, assert_serves
from harness.servers.raw_peer import RawPeer
from mgpu.orchestrator.gateway.text import panics
from mgpu.orchestrator.gateway.text.gguf_tokenizer import TokenizerError
from mgpu.orchestrator.gateway.text.tokenizer import load_codec

PATHOLOGICAL = {"type": "Split", "pattern": {"Regex": "(a+)+b|."}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


class LibraryPanic(BaseException):
    """Stands for pyo3's PanicException, which cannot be made from Python."""


def changed(model_folder: Path, folder: Path, **parts: Any) -> Path:
    """Copy a model folder with other parts of its tokenizer."""
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    return folder


@pytest.fixture(scope="module")
def pathological(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    split = {"type": "Sequence", "pretokenizers": [PATHOLOGICAL, BYTES]}
    return changed(model_folder, tmp_path_factory.mktemp("pathological"), pre_tokenizer=split)


@pytest.fixture
def gateway(pathological: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(pathological, max_request_bytes=1 << 20) as gateway:
        yield gateway
        assert_serves(gateway.endpoint)
        assert gateway.process.poll() is None


@pytest.fixture
def peer(gateway: GatewayProcess) -> Iterator[RawPeer]:
    peer = RawPeer(gateway.endpoint)
    yield peer
    peer.close()


@pytest.mark.parametrize("fields", [
    {"prompt": "a" * 30},
    {"prompt": "x" * 3000 + "a" * 30},
    {"messages": [{"role": "user", "content": "a" * 30}]},
], ids=["short", "long", "chat"])  # fmt: skip
def test_a_panic_at_a_prompt_fails_that_request(peer: RawPeer, fields: dict[str, Any]) -> None:
    for number in range(3):
        peer.say(type="generate", id=number, max_tokens=1, **fields)
        failed = peer.hear_all(number)[-1]  # a chat waits for the start of its template's process
        assert failed["code"] == "bad_request"
        assert failed["message"] == "the text cannot be tokenized: the tokenizer library gave up"


def test_the_library_writes_its_own_lines_for_the_first_panic_alone(
    pathological: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(panics, "_logged", set())
    codec = load_codec(str(pathological), "safetensors")
    assert codec is not None
    for _ in range(20):
        with pytest.raises(TokenizerError):
            codec.encode("a" * 30, add_special_tokens=False)
    os.write(2, b"standard error is open again")
    written = capfd.readouterr().err
    assert written.count("panicked at") == 1
    assert written.endswith("standard error is open again")


def test_prompts_that_never_end_delay_nobody_else(gateway: GatewayProcess) -> None:
    hanging, other = RawPeer(gateway.endpoint), RawPeer(gateway.endpoint)
    gateway.set_info(max_seq_len=1 << 20, kv_tokens=1 << 20)
    for number in range(5):
        hanging.say(type="generate", id=number, prompt=("a" * 20 + "c") * 40_000, max_tokens=1)
    for number in range(3):
        other.say(type="generate", id=number, messages=[{"role": "user", "content": "hello"}], max_tokens=1)
        assert other.hear_all(number)[-1]["type"] == "finished"
    heard = [hanging.hear()]
    while hanging.socket.poll(0):
        heard.append(hanging.hear())
    failed = [message for message in heard if message["type"] == "failed"]
    assert len(failed) <= 1, "each takes seconds until its process is ended"
    for number in range(1, 5):
        hanging.say(type="cancel", id=number)
    while "CPU time" not in (message := hanging.hear()).get("message", ""):
        assert message["type"] in ("keepalive", "finished")
    hanging.close()
    other.close()


def test_a_special_token_that_is_missing_fails_each_prompt(model_folder: Path, tmp_path: Path) -> None:
    single = [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    codec = load_codec(str(changed(model_folder, tmp_path, post_processor=template)), "safetensors")
    assert codec is not None
    with pytest.raises(TokenizerError, match="gave up"):
        codec.encode("hello")
    assert codec.encode("hello", add_special_tokens=False)


def test_a_panic_is_logged_once(pathological: Path, caplog: pytest.LogCaptureFixture) -> None:
    panics._logged.clear()
    codec = load_codec(str(pathological), "safetensors")
    assert codec is not None
    for _ in range(3):
        with pytest.raises(TokenizerError):
            codec.encode("a" * 30)
    [record] = caplog.records
    assert "retry-limit-in-match" in record.getMessage()


def test_a_panic_while_loading_is_a_mistake_of_the_files(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(path: str) -> Tokenizer:
        raise LibraryPanic(path)

    monkeypatch.setattr("mgpu.orchestrator.gateway.text.tokenizer.Tokenizer.from_file", panic)
    with pytest.raises(TokenizerError, match="not a usable tokenizer"):
        load_codec(str(model_folder), "safetensors")


@pytest.mark.parametrize("signal", [SystemExit, KeyboardInterrupt])
def test_signals_to_stop_are_no_panics(signal: type[BaseException]) -> None:
    with pytest.raises(signal), panics.no_panics("a test"):
        raise signal


def test_the_tokenizer_library_starts_no_threads(model_folder: Path) -> None:
    with GatewayProcess(model_folder) as gateway:
        tasks = Path(f"/proc/{gateway.process.pid}/task")
        before = len(list(tasks.iterdir()))
        peer = RawPeer(gateway.endpoint)
        peer.say(type="generate", id=1, prompt="hello " * 70, max_tokens=1)
        assert peer.hear_all(1)[-1]["type"] == "finished"
        assert len(list(tasks.iterdir())) == before
        peer.close()
