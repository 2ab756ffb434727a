"""Find models in the local cache of the hub, without a network. The layout is that of huggingface_hub."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.models.hub_files import INDEX, Part, gguf_files, is_gguf_wanted, small_files, weight_files
from mgpu.orchestrator.models.hub_names import HubName

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache, whole as far as it was asked for. ``path`` is its folder, or its GGUF file."""

    path: Path
    revision: str


def repository_folder(cache: Path, repo: str) -> Path:
    """Return where the cache keeps a repository."""
    return cache / f"models--{repo.replace('/', '--')}"


def reference_file(cache: Path, name: HubName) -> Path:
    """Return the file that says which commit a branch or tag was at last."""
    return repository_folder(cache, name.repo) / "refs" / (name.revision or "main")


def find_cached(cache: Path, name: HubName, part: Part) -> CachedModel:
    """Return a model of the cache. ModelError says what it lacks."""
    folder = repository_folder(cache, name.repo)
    snapshot = folder / "snapshots" / _commit(cache, name)
    if not snapshot.is_dir():
        raise ModelError(f"{name}: not in the hub cache {cache}")
    files = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
    if is_gguf_wanted(name, files):
        return CachedModel(snapshot / gguf_files(name, files)[0], snapshot.name)
    small_files(name, files, part)
    if part == "all":
        weight_files(name, files, read_weight_map(files[INDEX]) if INDEX in files else None)
    return CachedModel(snapshot, snapshot.name)


def _commit(cache: Path, name: HubName) -> str:
    """Return the commit of a revision; its own text if it is one, or is unknown."""
    if not _COMMIT.fullmatch(name.revision):
        try:
            text = reference_file(cache, name).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return "unknown"
        return text if _COMMIT.fullmatch(text) else "unknown"
    return name.revision


def read_weight_map(index: Path) -> Mapping[str, object]:
    """Return which file each tensor is in. ModelError unless the index can be read."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ModelError(f"{index}: more than the {_MAX_INDEX_BYTES} bytes allowed for an index")
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of weights: {type(error).__name__}") from error
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: not an index of weights: weight_map is no object")
    return weight_map
