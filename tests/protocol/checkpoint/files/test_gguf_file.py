"""GGUF headers: what is read, and that a hostile file is refused before anything is allocated for it."""

import math
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.assertions import assert_has_all
from harness.models.model_files import gguf_bytes, gguf_string, llama_gguf_tensors, string, string_array, u32
from mgpu.protocol.checkpoint.files.gguf_file import GGUF_TYPES, read_gguf
from mgpu.protocol.checkpoint.files.tensors import BLOCKS
from mgpu.protocol.checkpoint.read import CheckpointError

GOOD = gguf_bytes(
    {"general.architecture": string("llama"), "llama.block_count": u32(2), "words": string_array(["a", "bc"])},
    llama_gguf_tensors(),
)


def written(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def refusal(folder: Path, data: bytes) -> str:
    path = written(folder, data)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path, with_arrays=True)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_metadata_and_tensors_are_read_with_row_major_shapes(tmp_path: Path) -> None:
    header = read_gguf(written(tmp_path, GOOD), with_arrays=True)
    assert header.metadata == {"general.architecture": "llama", "llama.block_count": 2, "words": ["a", "bc"]}
    tensor = header.tensors["blk.1.ffn_gate.weight"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("F32", (96, 64), 96 * 64 * 4)


def test_tensor_offsets_point_at_the_data(tmp_path: Path) -> None:
    tensors = {"a.weight": ((3,), 0, struct.pack("<3f", 1, 2, 3)), "b.weight": ((2,), 0, struct.pack("<2f", 4, 5))}
    path = written(tmp_path, gguf_bytes({}, tensors))
    tensor = read_gguf(path, with_arrays=False).tensors["b.weight"]
    assert struct.unpack("<2f", path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]) == (4, 5)


@pytest.mark.parametrize(
    ("number", "name", "block", "nbytes"), [(n, name, *BLOCKS[name]) for n, name in GGUF_TYPES.items()]
)
def test_block_sizes_agree_with_the_reference_package(number: int, name: str, block: int, nbytes: int) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType(number)
    assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, nbytes)


def test_big_arrays_are_skipped_unless_wanted(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(10_000)]
    numbers = 9, struct.pack("<IQ", 6, 10_000) + bytes(40_000)
    path = written(tmp_path, gguf_bytes({"words": string_array(words), "scores": numbers, "after": u32(7)}, {}))
    assert read_gguf(path, with_arrays=False).metadata == {"after": 7}
    whole = read_gguf(path, with_arrays=True).metadata
    assert whole["words"] == words
    assert whole["scores"] == [0.0] * 10_000


def test_every_scalar_type_is_read(tmp_path: Path) -> None:
    values: dict[str, tuple[int, str, object]] = {
        "u8": (0, "B", 200), "i8": (1, "b", -3), "u16": (2, "H", 60000), "i16": (3, "h", -300),
        "u32": (4, "I", 1 << 31), "i32": (5, "i", -7), "f32": (6, "f", 0.5), "bool": (7, "?", True),
        "u64": (10, "Q", 1 << 63), "i64": (11, "q", -(1 << 40)), "f64": (12, "d", 0.1),
    }  # fmt: skip
    metadata = {key: (kind, struct.pack("<" + code, value)) for key, (kind, code, value) in values.items()}
    header = read_gguf(written(tmp_path, gguf_bytes(metadata, {})), with_arrays=False)
    assert header.metadata == {key: value for key, (_, _, value) in values.items()}


def header(num_tensors: int, num_keys: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + rest


REFUSALS: dict[str, tuple[bytes, list[str]]] = {
    **{f"cut off at byte {length}": (GOOD[:length], []) for length in (0, 3, 4, 23, 24, 60, 200)},
    "a truncated body names the tensor and both sizes":
        (GOOD[:-1000], ["blk.1.ffn_down.weight", str(len(GOOD)), str(len(GOOD) - 1000)]),
    "another format": (b"PK\x03\x04" + bytes(100), ["not a GGUF file"]),
    **{f"version {version}": (GOOD[:4] + struct.pack("<I", version) + GOOD[8:], [str(version)])
       for version in (0, 1, 4, 3 << 24)},
    **{f"count {count} at byte {at}": (GOOD[:at] + struct.pack("<Q", count) + GOOD[at + 8 :], [str(count)])
       for at in (8, 16) for count in (1 << 20, 1 << 40, (1 << 64) - 1)},
    **{f"an endless array of type {kind}":
       (gguf_bytes({"a": (9, struct.pack("<IQ", kind, 1 << 50))}, {}), [str(1 << 50)]) for kind in (6, 8, 9)},
    "an endless string": (gguf_bytes({"a": (8, struct.pack("<Q", (1 << 64) - 1))}, {}), []),
    "an endless key": (header(0, 1, struct.pack("<Q", 1 << 62) + bytes(100)), []),
    "a value of an unknown type": (gguf_bytes({"a": (99, b"1234")}, {}), ["type 99"]),
    "an array of an unknown type": (gguf_bytes({"a": (9, struct.pack("<IQ", 99, 0))}, {}), ["type 99"]),
    **{f"tensor type {name} is not supported":
       (gguf_bytes({}, {"blk.0.attn_q": ((256, 256), number, bytes(65536))}), [name, "blk.0.attn_q", "Q4_K"])
       for number, name in ((19, "IQ1_S"), (40, "NVFP4"), (4, "number 4"), (1 << 30, str(1 << 30)))},
    "rows that are not whole blocks": (gguf_bytes({}, {"t": ((4, 33), 8, bytes(1000))}), ["not a multiple of 32"]),
    **{f"shape {shape}": (gguf_bytes({}, {"t": (shape, 0, bytes(64))}), [])
       for shape in ((0, 4), (1 << 62, 1 << 62), (1 << 63,), (1, 1, 1, 1 << 40))},
    **{f"{count} dimensions": (header(1, 0, gguf_string("t") + struct.pack("<I", count) + bytes(200)), [str(count)])
       for count in (0, 5, 1 << 31)},
    **{f"alignment {value}": (gguf_bytes({"general.alignment": u32(value)}, {}), [str(value)])
       for value in (0, 1, 33, 1 << 31)},
}  # fmt: skip


@pytest.mark.parametrize(("data", "words"), REFUSALS.values(), ids=REFUSALS)
def test_a_damaged_or_hostile_file_is_refused_with_what_is_wrong(tmp_path: Path, data: bytes, words: list[str]) -> None:
    assert_has_all(refusal(tmp_path, data), *words)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    value = struct.pack("<IQ", 4, 0)
    for _ in range(2000):
        value = struct.pack("<IQ", 9, 1) + value
    assert "nested" in refusal(tmp_path, gguf_bytes({"a": (9, value)}, {}))


def test_repeated_keys_and_tensors_are_refused(tmp_path: Path) -> None:
    pair = gguf_string("a") + struct.pack("<II", 4, 1)
    assert "'a' occurs twice" in refusal(tmp_path, header(0, 2, pair + pair))
    info = gguf_string("t") + struct.pack("<IQIQ", 1, 1, 0, 0)
    assert "'t' occurs twice" in refusal(tmp_path, header(2, 0, info + info + bytes(100)))


def test_misaligned_and_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    def two(second_offset: int) -> bytes:
        infos = b"".join(
            gguf_string(name) + struct.pack("<IQIQ", 1, 64, 0, offset)
            for name, offset in (("a", 0), ("b", second_offset))
        )
        return header(2, 0, infos + bytes(2000))

    assert "not a multiple" in refusal(tmp_path, two(257))
    assert "overlap" in refusal(tmp_path, two(128))
    assert "tensor 'b' begins at byte 416; 352 was expected, since 'a' ends at 352" in refusal(tmp_path, two(320))
    assert len(read_gguf(written(tmp_path, two(256)), with_arrays=True).tensors) == 2


def test_tokens_that_are_not_utf8_do_not_matter(tmp_path: Path) -> None:
    value = 9, struct.pack("<IQ", 8, 1) + gguf_string(b"\xff\xfe")
    assert read_gguf(written(tmp_path, gguf_bytes({"t": value}, {})), with_arrays=True).metadata["t"] == [
        "\ufffd\ufffd"
    ]


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_gguf(path, with_arrays=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_read_or_refused_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(GOOD)
    for position, value in flips:
        data[position] = value
    path = written(tmp_path_factory.getbasetemp(), bytes(data))
    try:
        header = read_gguf(path, with_arrays=True)
    except CheckpointError:
        return
    assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in header.tensors.values())
    assert all(math.prod(tensor.shape) > 0 for tensor in header.tensors.values())
