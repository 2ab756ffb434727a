"""Read the header of a safetensors file: names, types, shapes and byte ranges, all checked. Stdlib only.

Format: 8 bytes little-endian header length, a JSON object, then the tensors back to back without gaps
(https://github.com/huggingface/safetensors#format).
"""

import math
from pathlib import Path

from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, file_size, parse_json_object, reading
from mgpu.protocol.checkpoint.files.wrong_kind import HEAD_BYTES, wrong_kind

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 17
MAX_DIMS = 8

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one file by name. CheckpointError when the header and the file disagree."""
    size = file_size(path)
    header, data_start = _read_header(path, size)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: header: {len(header)} tensors, more than the {MAX_TENSORS} allowed")
    entries = [_entry(path, name, info, data_start) for name, info in header.items() if name != "__metadata__"]
    _check_coverage(path, entries, data_start, size)
    return {entry.name: entry for entry in entries}


def _read_header(path: Path, size: int) -> tuple[dict[str, object], int]:
    with reading(path), open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        prefix = head[:8]
        length = int.from_bytes(prefix, "little")
        if (len(prefix) < 8 or length > size - 8) and (kind := wrong_kind(head)):
            raise CheckpointError(f"{path}: not a safetensors file: it {kind}")
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: not a safetensors file: {size} bytes")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: truncated or corrupt: claims a header of {length} bytes in a file of {size} "
                f"(at most {MAX_HEADER_BYTES} allowed)"
            )
        file.seek(8)
        data = file.read(length)
    return parse_json_object(data, f"{path}: header"), 8 + length


def _entry(path: Path, name: str, info: object, data_start: int) -> TensorEntry:
    if not isinstance(info, dict):
        raise CheckpointError(f"{path}: tensor {name!r} is not described by an object")
    dtype = info.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}")
    shape = _sizes(info.get("shape"))
    if shape is None or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{path}: tensor {name!r} has no usable shape")
    offsets = _sizes(info.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: tensor {name!r} has no usable byte range")
    nbytes, needed = offsets[1] - offsets[0], math.prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != needed:
        raise CheckpointError(
            f"{path}: tensor {name!r} of {dtype} {list(shape)} needs {needed} bytes, its range has {nbytes}"
        )
    return TensorEntry(name, dtype, shape, str(path), data_start + offsets[0], nbytes)


def _sizes(value: object) -> tuple[int, ...] | None:
    """Return a list of sizes as a tuple; None if the value is anything else."""
    if not isinstance(value, list) or any(type(item) is not int or not 0 <= item < 1 << 62 for item in value):
        return None
    return tuple(value)


def _check_coverage(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Refuse gaps, overlaps, and data that ends before or after the file does."""
    end = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {entry.name!r} at byte {entry.offset} {kind} (expected {end})")
        end += entry.nbytes
    if end != size:
        word = "truncated" if size < end else "has trailing bytes"
        raise CheckpointError(f"{path}: {word}: its tensors end at byte {end}, the file has {size}")
