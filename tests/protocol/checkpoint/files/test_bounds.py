"""Headers that cost their author nothing: a sparse file must not cost its reader memory or time."""

import json
import os
import struct
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from harness.models.model_files import gguf_bytes, gguf_string, safetensors_bytes, string, string_array, u32
from mgpu.protocol.checkpoint.files import gguf_file, safetensors_file, untrusted
from mgpu.protocol.checkpoint.files.gguf_file import read_gguf
from mgpu.protocol.checkpoint.files.safetensors_file import read_safetensors
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, read_json_object
from mgpu.protocol.checkpoint.gguf import model as gguf_model

MIB = 1 << 20
READ = """
import sys
from mgpu.protocol.checkpoint.files.gguf_file import read_gguf
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
try:
    read_gguf(sys.argv[1], with_arrays=True)
except CheckpointError as error:
    print(error)
lines = open("/proc/self/status").read().splitlines()
print("peak", *(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def array_start(kind: int, count: int, key: str = "a") -> bytes:
    """Return the beginning of a file whose only entry is an array; what follows in a sparse file is zeros."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string(key) + struct.pack("<IIQ", 9, kind, count)


def sparse(path: Path, start: bytes, size: int = 300 * MIB) -> Path:
    path.write_bytes(start)
    os.truncate(path, size)
    assert path.stat().st_blocks * 512 < MIB
    return path


HOSTILE = {
    "small numbers": array_start(0, 250 * MIB),
    "floats": array_start(6, 60 * MIB, "tokenizer.ggml.scores"),
    "scores of bytes": array_start(0, 200 * MIB, "tokenizer.ggml.scores"),
    "strings": array_start(8, 30 * MIB),
    "tokens": array_start(8, 30 * MIB, "tokenizer.ggml.tokens"),
    "arrays": array_start(9, 20 * MIB),
    "as many tokens as allowed": array_start(8, gguf_file.MAX_STRINGS, "tokenizer.ggml.tokens"),
    "as many other strings as allowed": array_start(8, gguf_file.MAX_STRINGS),
    "as many arrays as allowed": array_start(9, 1 << 16),
    "one string": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string("a") + struct.pack("<IQ", 8, 250 * MIB),
    "tensors": b"GGUF" + struct.pack("<IQQ", 3, 2_000_000, 0),
    "entries": b"GGUF" + struct.pack("<IQQ", 3, 0, 2_000_000),
}


@pytest.mark.parametrize("start", HOSTILE.values(), ids=HOSTILE)
def test_a_sparse_gguf_costs_little_memory_and_time(tmp_path: Path, start: bytes) -> None:
    path = sparse(tmp_path / "model.gguf", start)
    began_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    peak_kib = int(done.stdout.split()[-1])
    assert peak_kib < 400 * 1024, done.stdout
    assert time.monotonic() - began_s < 30


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path, with_arrays=False)
    return str(caught.value)


@pytest.mark.parametrize(("start", "words"), [
    (HOSTILE["tensors"], ["2000000 tensors", str(gguf_file.MAX_TENSORS)]),
    (HOSTILE["entries"], ["2000000 metadata entries", str(gguf_file.MAX_ENTRIES)]),
    (HOSTILE["tokens"], ["tokenizer.ggml.tokens", str(30 * MIB), str(gguf_file.MAX_STRINGS)]),
    (HOSTILE["floats"], ["tokenizer.ggml.scores", str(60 * MIB), str(gguf_file.MAX_STRINGS)]),
    (HOSTILE["arrays"], ["a has", str(20 * MIB), str(gguf_file.MAX_INNER)]),
])  # fmt: skip
def test_what_is_too_much_is_refused_with_file_key_and_numbers(tmp_path: Path, start: bytes, words: list[str]) -> None:
    path = sparse(tmp_path / "model.gguf", start)
    assert_has_all(refusal(path), str(path), *words)


def test_many_small_lists_and_much_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    numbers = 9, struct.pack("<IQ", 0, 4096) + bytes(4096)
    path.write_bytes(gguf_bytes({f"a{index}": numbers for index in range(300)}, {}))
    assert_has_all(refusal(path), "a256", str(gguf_file.MAX_LISTED))
    text = 8, struct.pack("<Q", 10 * MIB) + bytes(10 * MIB)
    path.write_bytes(gguf_bytes({f"a{index}": text for index in range(8)}, {}))
    assert_has_all(refusal(path), str(70 * MIB), str(gguf_file.MAX_TEXT_BYTES))


def test_strings_are_skipped_wherever_a_read_of_the_file_ends(tmp_path: Path) -> None:
    """The file is read in portions of a megabyte: a string or its length may lie across their edge, or be longer."""
    path = tmp_path / "model.gguf"
    for shift in range(12):
        words = ["x" * shift, *["y" * 5] * 90_000, "z" * (3 * MIB), "", "z"]
        path.write_bytes(gguf_bytes({"unused": string_array(words), "after": u32(7)}, {}))
        assert read_gguf(path, with_arrays=False).metadata == {"after": 7}


def test_the_last_skipped_string_must_end_inside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = gguf_bytes({"unused": string_array(["y"] * 5000)}, {}, alignment=1)
    path.write_bytes(whole[:-9] + struct.pack("<Q", 1 << 63) + b"y")
    assert "the file has" in refusal(path)


def test_the_headers_of_all_parts_of_a_model_have_the_bound_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile model may name 9999 parts, each a sparse file."""
    monkeypatch.setattr(gguf_model, "MAX_HEADER_BYTES", MIB)
    split = {"general.architecture": string("llama"), "split.count": u32(9)}
    (tmp_path / "m-00001-of-00009.gguf").write_bytes(gguf_bytes(split, {}))
    for part in range(2, 10):
        sparse(tmp_path / f"m-{part:05}-of-00009.gguf", array_start(8, 30_000), MIB)
    with pytest.raises(CheckpointError, match=rf"00006.*bytes of headers up to this part; at most {MIB}"):
        gguf_model.read_gguf_checkpoint(tmp_path / "m-00001-of-00009.gguf")


def test_a_big_vocabulary_is_read_packed_and_an_unused_array_beside_it_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    count = 200_000
    words = [f"w{index}" for index in range(count)]
    scores = array("f", range(count))
    entries = {
        "tokenizer.ggml.tokens": string_array(words),
        "unused.words": string_array(words),
        "unused.numbers": (9, struct.pack("<IQ", 6, count) + scores.tobytes()),
        "tokenizer.ggml.scores": (9, struct.pack("<IQ", 6, count) + scores.tobytes()),
        "after": u32(7),
    }
    path.write_bytes(gguf_bytes(entries, {}))
    metadata = read_gguf(path, with_arrays=True).metadata
    assert metadata == {"tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": scores, "after": 7}
    assert read_gguf(path, with_arrays=False).metadata == {"after": 7}


def test_json_of_many_items_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a":[' + "{}," * 3_000_000 + "{}]}")
    problem = rf"config\.json: \d+ items of JSON, more than the {untrusted.MAX_JSON_ITEMS}"
    with pytest.raises(CheckpointError, match=problem):
        read_json_object(path)


def test_a_safetensors_header_of_too_many_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    count = safetensors_file.MAX_TENSORS + 1
    header = json.dumps({str(index): {} for index in range(count)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=f"{count} tensors, more than the {safetensors_file.MAX_TENSORS}"):
        read_safetensors(path)
    path.write_bytes(safetensors_bytes({"a": (2, 2)}))
    assert set(read_safetensors(path)) == {"a"}
