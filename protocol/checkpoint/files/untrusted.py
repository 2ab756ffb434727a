"""Read untrusted files: paths that stay inside their folder, JSON, and fields with checked types and bounds."""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mgpu.protocol.checkpoint.files.wrong_kind import HEAD_BYTES, wrong_kind

MAX_JSON_BYTES = 16 << 20
"""Larger than any real config.json or shard index; bounds what a hostile folder makes us parse."""

MAX_JSON_ITEMS = 1 << 21
"""Commas and brackets: an empty object of three bytes costs forty times as much in memory."""


class Limit:
    """What a model may claim. Larger claims are mistakes or attacks."""

    HIDDEN, LAYERS, HEADS, HEAD_DIM, VOCAB, POSITION = 1 << 18, 4096, 4096, 4096, 1 << 24, 1 << 30
    EXPERTS = 4096


class CheckpointError(ValueError):
    """The model files cannot be served as they are; the text names the file and the numbers."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a CheckpointError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def file_size(path: Path) -> int:
    """Return the size in bytes of an existing file. CheckpointError when it cannot be read."""
    with reading(path):
        return os.stat(path).st_size


def checked_file(folder: Path, name: str) -> Path:
    """Return the path of a regular file that lies directly in ``folder``.

    A symlink may leave the folder only into the ``blobs`` directory of the same Hugging Face cache entry.
    CheckpointError when the name is not a plain file name, or the file is missing, special or elsewhere.
    """
    check_plain_name(folder, name)
    path = folder / name
    with reading(path):
        try:
            target = path.resolve(strict=True)
        except RuntimeError as error:  # a loop of symlinks
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        mode = target.stat().st_mode
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    if target.parent not in _allowed_parents(folder):
        raise CheckpointError(f"{path}: links to {target}, outside the model folder")
    return path


def check_plain_name(folder: Path, name: str) -> None:
    """Raise CheckpointError when the name is more than the name of a file in ``folder``."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: {name!r} is not a plain file name inside the model folder")


def _allowed_parents(folder: Path) -> tuple[Path, ...]:
    home = folder.resolve()
    for revision in (home, *home.parents):  # a model may lie in a folder below that of its revision
        if revision.parent.name == "snapshots":
            return home, revision.parent.parent / "blobs"
    return (home,)


def read_json_object(path: Path) -> dict[str, object]:
    """Parse a JSON file whose top level is an object without repeated keys."""
    size = file_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size} bytes, more than the {MAX_JSON_BYTES} allowed for a JSON file")
    with reading(path):
        data = path.read_bytes()
    if not data.lstrip().startswith(b"{") and (kind := wrong_kind(data[:HEAD_BYTES])):
        raise CheckpointError(f"{path}: not valid JSON: it {kind}")
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, source: str) -> dict[str, object]:
    """Parse JSON bytes whose top level is an object; ``source`` names them in errors."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"{source}: a JSON object names the same key twice")
        return result

    items = data.count(b",") + data.count(b"{") + data.count(b"[")
    if items > MAX_JSON_ITEMS:
        raise CheckpointError(f"{source}: {items} items of JSON, more than the {MAX_JSON_ITEMS} allowed")
    try:
        value = json.loads(data, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """Typed access to a mapping with unchecked values. Null counts as absent."""

    def __init__(self, source: str, values: Mapping[str, object], prefix: str = "") -> None:
        self.source = source
        self._values = values
        self._prefix = prefix

    def raw(self, key: str) -> object:
        return self._values.get(self._prefix + key)

    def with_value(self, key: str, value: object) -> "Fields":
        """Return the same fields, but for one."""
        return Fields(self.source, {**self._values, self._prefix + key: value}, self._prefix)

    def has(self, key: str) -> bool:
        return self.raw(key) is not None

    def declares(self, key: str) -> bool:
        """Return True if the key is present, even if it is null."""
        return self._prefix + key in self._values

    def _present(self, key: str, default: object) -> object:
        value = default if self.raw(key) is None else self.raw(key)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {self._prefix}{key} {problem}")

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 30) -> int:
        """Return an integer in [low, high]. CheckpointError when absent without default, mistyped or out of range."""
        value = self._present(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"must be an integer, found {_shown(value)}")
        if not low <= value <= high:
            raise self.error(key, f"is {_shown(value)}, outside [{low}, {high}]")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        return self._number(key, self._present(key, default))

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """Return a list of ``length`` finite numbers above 0."""
        values = self._present(key, None)
        if not isinstance(values, list):
            raise self.error(key, f"must be a list of numbers, found {_shown(values)}")
        if len(values) != length:
            raise self.error(key, f"has {len(values)} entries, expected {length}")
        return tuple(self._number(key, value) for value in values)

    def _number(self, key: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(key, f"must be a number, found {_shown(value)}")
        # The comparison comes first: an integer beyond float's range must not reach isfinite.
        if not 0 < value <= 1e30 or not math.isfinite(value):
            raise self.error(key, f"is {_shown(value)}, expected a finite number above 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, found {_shown(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._present(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, found {_shown(value)}")
        return value

    def nested(self, key: str) -> "Fields | None":
        """Return the object under a key; None when absent or empty."""
        value = self.raw(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, found {_shown(value)}")
        return Fields(f"{self.source}: {self._prefix}{key}", value)

    def names(self, most: int) -> list[str]:
        """Return the keys that have a value, at most so many."""
        names = [key for key, value in self._values.items() if value is not None]
        if len(names) > most:
            raise CheckpointError(f"{self.source} has {len(names)} entries, more than the {most} allowed")
        return names

    def list_of(self, key: str, kind: type, length: int | None = None) -> list[object] | None:
        """Return a list whose items are all of ``kind``; None when absent."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.error(key, f"must be a list of {kind.__name__}")
        if length is not None and len(value) != length:
            raise self.error(key, f"has {len(value)} entries, expected {length}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return token ids, which may be written as one integer or as a list. -1, signed or not, stands for none."""
        value = self.raw(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        items = [item for item in items if type(item) is not int or item not in (-1, 0xFFFFFFFF)]
        if any(type(item) is not int or not 0 <= item < 1 << 31 for item in items):
            raise self.error(key, f"must be a token id or a list of them, found {_shown(value)}")
        return tuple(items)


def _shown(value: object) -> str:
    """Quote a hostile value without printing megabytes of it (or an integer too long to print)."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
