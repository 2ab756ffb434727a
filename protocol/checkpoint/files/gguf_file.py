"""Read the header of a GGUF file: metadata and the places of its tensors. Stdlib only; tensor data is not read.

Every count and size is checked against the size of the file before anything is allocated. A file may be sparse and
cost its author nothing, so what is built has bounds of its own; what nobody uses is stepped over.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import math
import struct
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mgpu.protocol.checkpoint.files.tensors import BLOCKS
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, file_size, reading
from mgpu.protocol.checkpoint.files.wrong_kind import HEAD_BYTES, wrong_kind

GGUF_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16", 39: "MXFP4",
}  # fmt: skip
"""Names of ggml's type numbers."""
_UNSUPPORTED_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALL_ARRAY = 4096
"""Arrays up to this length are built even when big ones are skipped: per-layer numbers, stop ids."""
_MAX_KEY_BYTES = 65535
_MAX_NESTING = 4
_CHUNK = 1 << 20
MAX_HEADER_BYTES = 256 << 20
"""Ten times the largest vocabulary in use."""
MAX_TENSORS = 1 << 17
MAX_ENTRIES = 1 << 16
MAX_STRINGS = 1 << 21
"""Strings of all arrays together, and numbers of one array that is used: a vocabulary, its merges. Three times the most
in use."""
MAX_INNER = 1 << 16
"""Arrays inside arrays. Nobody uses any."""
MAX_LISTED = 1 << 20
"""Numbers in lists, of all arrays together."""
MAX_TEXT_BYTES = 64 << 20
"""Of all strings that are built. The largest vocabulary in use has 12 MiB with its merges."""
_BIG_ARRAYS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type"))
_OTHER_ARRAY = 1 << 16
"""The longest array of another name that is built."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: ``shape`` is row-major (GGUF stores it reversed), ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: dict[str, object]
    """Values as int, float, bool, str or lists of them. Big arrays of numbers are `array`; skipped ones are absent."""
    tensors: dict[str, GgufTensor]
    nbytes: int = 0
    """Of the header in its file."""
    trailing_bytes: int = 0
    """Of the file, after its last tensor."""


def read_gguf(path: str | Path, with_arrays: bool, kept: Collection[str] = ()) -> GgufHeader:
    """Read a GGUF header. ``with_arrays=False`` skips big arrays, but for those ``kept``, instead of building them.

    CheckpointError for anything that is not a whole, consistent GGUF file.
    """
    path = Path(path)
    with reading(path), open(path, "rb") as file:
        head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
        if not head.startswith(b"GGUF") and (kind := wrong_kind(head)):
            raise CheckpointError(f"{path}: not a GGUF file: it {kind}")
        return _read(_Cursor(path, file, file_size(path)), with_arrays, kept)


class _Cursor:
    """Position in a file whose reads are checked against its size and buffered."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file
        self._buffer, self._buffer_start = b"", 0
        self._strings = self._inner = self._listed = self._text_bytes = 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    @property
    def remaining(self) -> int:
        return self.size - self.position

    def take(self, count: int) -> int:
        """Advance over ``count`` bytes and return where they start in the buffer."""
        start, end = self.position - self._buffer_start, self.position + count
        if start + count > len(self._buffer):
            self._fill(end)
            start = 0
        self.position = end
        return start

    def skip(self, count: int) -> None:
        """Advance over ``count`` bytes without reading them."""
        end = self.position + count
        self._check_end(end)
        if end > self._buffer_start + len(self._buffer):
            self._file.seek(end)
            self._buffer, self._buffer_start = b"", end
        self.position = end

    def skip_strings(self, count: int) -> None:
        """Advance over ``count`` strings. The loop is for the many short ones that the buffer holds."""
        while count:
            buffer, at = self._buffer, self.position - self._buffer_start
            last = len(buffer) - 8
            while count and at <= last:
                at += 8 + int.from_bytes(buffer[at : at + 8], "little")
                count -= 1
            self.skip(self._buffer_start + at - self.position)
            if count:
                self.skip(self.u64())
                count -= 1

    def _check_end(self, end: int) -> None:
        if end > self.size:
            raise self.error(f"truncated or corrupt GGUF: the header needs byte {end}, the file has {self.size}")
        if end > MAX_HEADER_BYTES:
            raise self.error(f"the header needs byte {end}; at most {MAX_HEADER_BYTES} are allowed")

    def _fill(self, end: int) -> None:
        """Drop what has been read, and have the bytes up to ``end`` in the buffer."""
        self._check_end(end)
        rest = self._buffer[self.position - self._buffer_start :]
        self._buffer_start = self.position
        self._buffer = rest + self._file.read(max(end - self.position - len(rest), _CHUNK))
        if end > self._buffer_start + len(self._buffer):
            found = self._buffer_start + len(self._buffer)
            raise self.error(f"truncated while reading: {found} of {self.size} bytes")

    def unpack(self, layout: struct.Struct) -> tuple[object, ...]:
        start = self.take(layout.size)
        return layout.unpack_from(self._buffer, start)

    def u32(self) -> int:
        return int.from_bytes(self.data(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.data(8), "little")

    def data(self, count: int) -> bytes:
        start = self.take(count)
        return self._buffer[start : start + count]

    def string(self) -> str:
        # Tokens of a vocabulary need not be UTF-8. They are displayed, never used as keys.
        length = self.u64()
        self._text_bytes += length
        if self._text_bytes > MAX_TEXT_BYTES and length <= self.remaining:
            raise self.error(
                f"its metadata has {self._text_bytes} bytes of text at byte {self.position}; at most {MAX_TEXT_BYTES}"
            )
        return self.data(length).decode("utf-8", "replace")

    def count_strings(self, key: str, count: int) -> None:
        """Add strings to those of all arrays read so far. CheckpointError when they are too many."""
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self.error(
                f"{key} has {count} entries, all arrays {self._strings}; at most {MAX_STRINGS} are allowed"
            )

    def count_inner(self, key: str, count: int) -> None:
        """Add arrays inside arrays to those so far. CheckpointError when they are too many."""
        self._inner += count
        if self._inner > MAX_INNER:
            raise self.error(f"{key} has {count} inner arrays, all {self._inner}; at most {MAX_INNER} are allowed")

    def count_listed(self, key: str, count: int) -> None:
        """Add numbers that become a list to those so far. CheckpointError when they are too many."""
        self._listed += count
        if self._listed > MAX_LISTED:
            raise self.error(f"{key} has {count} numbers, all lists {self._listed}; at most {MAX_LISTED} are allowed")

    def key(self) -> str:
        length = self.u64()
        if length > _MAX_KEY_BYTES:
            raise self.error(f"a name of {length} bytes at byte {self.position}; at most {_MAX_KEY_BYTES}")
        try:
            return self.data(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a name before byte {self.position} is not UTF-8") from error

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.remaining:
            raise self.error(f"claims {count} {what}, but only {self.remaining} bytes follow")


def _read(cursor: _Cursor, with_arrays: bool, kept: Collection[str]) -> GgufHeader:
    if cursor.size < 24 or cursor.data(4) != b"GGUF":
        raise cursor.error("not a GGUF file (it does not begin with GGUF)")
    version = cursor.u32()
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version} is not supported (2 and 3 are; big-endian files are not)")
    num_tensors, num_pairs = cursor.u64(), cursor.u64()
    for count, most, what in ((num_pairs, MAX_ENTRIES, "metadata entries"), (num_tensors, MAX_TENSORS, "tensors")):
        if count > most:
            raise cursor.error(f"claims {count} {what}; at most {most} are allowed")
    cursor.check_count(num_pairs, 13, "metadata entries")
    metadata = _read_metadata(cursor, num_pairs, with_arrays, kept)
    cursor.check_count(num_tensors, 24, "tensors")
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    nbytes, alignment = cursor.position, _alignment(cursor, metadata)
    tensors = _place_tensors(cursor, infos, alignment)
    trailing = _check_coverage(cursor, tensors, -(-nbytes // alignment) * alignment, alignment)
    return GgufHeader(metadata, tensors, nbytes, trailing)


def _read_metadata(cursor: _Cursor, count: int, with_arrays: bool, kept: Collection[str]) -> dict[str, object]:
    metadata: dict[str, object] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.key()
        if key in seen:
            raise cursor.error(f"metadata key {key!r} occurs twice")
        seen.add(key)
        kind = cursor.u32()
        value = _read_array(cursor, key, with_arrays or key in kept, 1) if kind == _ARRAY else _read_value(cursor, kind)
        if value is not None:
            metadata[key] = value
    return metadata


def _read_value(cursor: _Cursor, kind: int) -> object:
    if kind == _STRING:
        return cursor.string()
    return cursor.unpack(struct.Struct("<" + _scalar_code(cursor, kind)))[0]


def _scalar_code(cursor: _Cursor, kind: int) -> str:
    """Return the letter that `struct` uses for a metadata type."""
    if kind not in _SCALARS:
        raise cursor.error(f"unknown metadata type {kind} at byte {cursor.position}")
    return _SCALARS[kind]


def _read_array(cursor: _Cursor, key: str, with_arrays: bool, depth: int) -> "list[object] | array[Any] | None":
    """Read an array. A big one that is not wanted is stepped over; the result is None."""
    kind, count = cursor.u32(), cursor.u64()
    is_big = with_arrays and key in _BIG_ARRAYS and depth == 1
    keep = is_big or count <= (_OTHER_ARRAY if with_arrays else _SMALL_ARRAY)
    if kind == _STRING:
        cursor.check_count(count, 8, "strings")
        cursor.count_strings(key, count)
        if keep:
            return [cursor.string() for _ in range(count)]
        cursor.skip_strings(count)
        return None
    if kind == _ARRAY:
        if depth == _MAX_NESTING:
            raise cursor.error(f"arrays nested deeper than {_MAX_NESTING}")
        cursor.check_count(count, 12, "arrays")
        cursor.count_inner(key, count)
        inner: list[object] = [_read_array(cursor, key, with_arrays, depth + 1) for _ in range(count)]
        return inner if keep else None
    return _read_numbers(cursor, key, _scalar_code(cursor, kind), count, is_big, keep)


def _read_numbers(
    cursor: _Cursor, key: str, code: str, count: int, is_big: bool, keep: bool
) -> "list[object] | array[Any] | None":
    """Read an array of numbers. One of a used name is packed (bool as 0 and 1), another short one is a list."""
    width = struct.calcsize("<" + code)
    cursor.check_count(count, width, "numbers")
    if key in _BIG_ARRAYS and count > MAX_STRINGS:
        raise cursor.error(f"{key} has {count} numbers; at most {MAX_STRINGS} are allowed")
    if is_big:
        numbers = array(code.replace("?", "B"))
        numbers.frombytes(cursor.data(count * width))
        return numbers
    if keep:
        cursor.count_listed(key, count)
        return list(cursor.unpack(struct.Struct(f"<{count}{code}")))
    cursor.skip(count * width)
    return None


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.key()
    num_dims = cursor.u32()
    if not 1 <= num_dims <= 4:
        raise cursor.error(f"tensor {name!r} has {num_dims} dimensions, expected 1 to 4")
    dims = tuple(cursor.u64() for _ in range(num_dims))
    return name, dims[::-1], cursor.u32(), cursor.u64()


def _alignment(cursor: _Cursor, metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 8 <= value <= 1 << 20 or value & (value - 1):
        raise cursor.error(f"general.alignment is {value!r}, expected a power of two between 8 and {1 << 20}")
    return value


def _place_tensors(
    cursor: _Cursor, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> dict[str, GgufTensor]:
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_number, offset in infos:
        if name in tensors:
            raise cursor.error(f"tensor {name!r} occurs twice")
        dtype, nbytes = _tensor_bytes(cursor, name, shape, type_number)
        if offset % alignment:
            raise cursor.error(f"tensor {name!r} starts at offset {offset}, not a multiple of {alignment}")
        if data_start + offset + nbytes > cursor.size:
            raise cursor.error(
                f"truncated: tensor {name!r} ends at byte {data_start + offset + nbytes}, the file has {cursor.size}"
            )
        tensors[name] = GgufTensor(name, dtype, shape, data_start + offset, nbytes)
    return tensors


def _tensor_bytes(cursor: _Cursor, name: str, shape: tuple[int, ...], type_number: int) -> tuple[str, int]:
    if type_number not in GGUF_TYPES:
        known = ", ".join(GGUF_TYPES.values())
        stored = _UNSUPPORTED_TYPES.get(type_number, f"number {type_number}")
        raise cursor.error(f"tensor {name!r} has the unsupported GGUF type {stored}; supported types: {known}")
    dtype = GGUF_TYPES[type_number]
    block, block_bytes = BLOCKS[dtype]
    if min(shape) < 1:
        raise cursor.error(f"tensor {name!r} has shape {shape}")
    if shape[-1] % block:
        raise cursor.error(f"tensor {name!r} of type {dtype} has rows of {shape[-1]}, not a multiple of {block}")
    return dtype, math.prod(shape) // block * block_bytes


def _check_coverage(cursor: _Cursor, tensors: dict[str, GgufTensor], data_start: int, alignment: int) -> int:
    """Refuse overlaps and gaps, as llama.cpp does: some tensor then is not of the type or size that it says.

    Return how many bytes follow the last tensor and its padding.
    """
    end, before = data_start, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise cursor.error(f"tensors {before!r} and {tensor.name!r} overlap at byte {tensor.offset}")
        if tensor.offset > (expected := -(-end // alignment) * alignment):
            raise cursor.error(
                f"tensor {tensor.name!r} begins at byte {tensor.offset}; {expected} was expected, since {before!r} "
                f"ends at {end}"
            )
        end, before = tensor.offset + tensor.nbytes, tensor.name
    return max(0, cursor.size - -(-end // alignment) * alignment) if tensors else 0
