"""Find the model that ``-m`` names: a folder, a .gguf file, the demo model, or a model of the Hugging Face hub."""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.models.demo import DEMO_NAME, demo_model_path
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, has_weights, read_checkpoint
from mgpu.protocol.model.facts import CheckpointFormat, LoadFormat

_PLAIN_TYPES = ("F32", "F16", "BF16")
"""Tensor types that torch reads by itself."""
FORMS = (
    "-m takes a model folder (config.json, *.safetensors, tokenizer.json), a .gguf file, `demo`, or a hub id such as "
    "Qwen/Qwen3-0.6B"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json")
Part = Literal["all", "no weights", "config"]
_FILES: dict[Part, tuple[str, ...]] = {
    "config": _CONFIG_FILES,
    "no weights": _CONFIG_FILES + _TOKENIZER_FILES,
    "all": _CONFIG_FILES + _TOKENIZER_FILES + _WEIGHT_FILES,
}
_UNWANTED_FILES = ("*/*", "consolidated*")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine. ``path`` is absolute: a folder, or a file for GGUF."""

    path: str
    format: CheckpointFormat
    name: str
    """Its name for clients and logs."""


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for downloads: MGPU_CACHE, else XDG_CACHE_HOME/mgpu, else ~/.cache/mgpu."""
    if own := environ.get("MGPU_CACHE"):
        return Path(own)
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mgpu"


def resolve_model(
    name: str,
    *,
    part: Part = "all",
    report: Callable[[str], None] = lambda line: None,
    environ: Mapping[str, str] = os.environ,
) -> ResolvedModel:
    """Find a model, fetching the demo or a model of the hub. ModelError lists the forms that -m takes.

    ``part`` is what the caller needs of a hub model: dummy weights and planning need less. ``report`` gets a line
    before anything is fetched.
    """
    if not name.strip():
        raise ModelError(f"no model is named; {FORMS}")
    try:
        return _resolved(name, part, report, environ)
    except (OSError, RuntimeError) as error:  # a name too long, a closed folder; RuntimeError: expanduser, for ~nobody
        reason = (error.strerror if isinstance(error, OSError) else "") or error
        raise ModelError(f"{name[:200]}: cannot be looked up: {reason}; {FORMS}") from error


def _resolved(name: str, part: Part, report: Callable[[str], None], environ: Mapping[str, str]) -> ResolvedModel:
    path = Path(name).expanduser()
    if path.is_dir():
        return ResolvedModel(str(path.absolute()), "safetensors", path.resolve().name or name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name}: a file that is not .gguf; {FORMS}")
        return ResolvedModel(str(path.absolute()), "gguf", path.stem)
    if name == "demo":
        file = demo_model_path(cache_root(environ), report, verify=part != "config")
        return ResolvedModel(str(file.absolute()), "gguf", DEMO_NAME)
    if _HUB_ID.fullmatch(name) and not name.lower().endswith(".gguf"):
        return ResolvedModel(_fetch_from_hub(name, _FILES[part], report), "safetensors", name)
    raise ModelError(f"{name}: no such file or folder; {FORMS}")


def _fetch_from_hub(name: str, patterns: Sequence[str], report: Callable[[str], None]) -> str:
    """Return the snapshot folder of a hub model, from the local cache if possible. Never fetches code or pickles."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(f"{name}: no such folder, and without the package huggingface_hub no hub: {FORMS}") from error
    report(f"looking up {name} in the hub cache, else downloading it")
    try:
        return str(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(_UNWANTED_FILES)))
    except (OSError, ValueError, RuntimeError) as error:  # the errors of huggingface_hub and of HTTP derive from these
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{name}: not a folder here, and the hub did not give it: {reason[0][:300]}. {FORMS}"
        ) from error


def read_model(model: ResolvedModel, load_format: LoadFormat = "auto") -> Checkpoint:
    """Read the headers of a resolved model. ModelError when the files cannot be used."""
    try:
        return read_checkpoint(model.path, load_format)
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def check_loadable(checkpoint: Checkpoint) -> None:
    """Raise ModelError when reading the weights needs a package that is not installed."""
    blocks = sorted({entry.dtype for entry in checkpoint.tensors.values() if entry.dtype not in _PLAIN_TYPES})
    if blocks and checkpoint.source.format == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {', '.join(blocks)} tensors needs the gguf package; type: pip install gguf")


def read_model_to_plan(model: ResolvedModel) -> Checkpoint:
    """Read a model to plan it. Its weights may be absent: a folder with config.json alone is enough."""
    try:
        is_complete = model.format == "gguf" or has_weights(Path(model.path))
    except OSError as error:
        raise ModelError(f"{model.path}: cannot be read: {error.strerror or error}") from error
    return read_model(model, "auto" if is_complete else "dummy")
