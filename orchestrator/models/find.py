"""Find the model that ``-m`` names: a folder, a .gguf file, the demo model, or a model of the Hugging Face hub."""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from mgpu.orchestrator.errors import HubUnreachable, ModelError
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
HUB_PREFIX, BUILT_IN_DEMO = "hf:", "builtin:demo"
"""How to name a model of the hub, and the demo, where a folder has the same name."""
_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
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
_LASTING = frozenset({
    "HFValidationError", "RepositoryNotFoundError", "RevisionNotFoundError", "OfflineModeIsEnabled", "ImportError",
    "InvalidURL", "UnsupportedProtocol",
})  # fmt: skip
"""Errors of the hub's package and its HTTP library that only the user can help, by name: the library changes."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine. ``path`` is absolute: a folder, or a file for GGUF."""

    path: str
    format: CheckpointFormat
    name: str
    """Its name for clients and logs."""
    is_demo: bool = False
    """True: it runs on any machine, if need be on some of the GPUs."""


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
        model = _resolved(name, part, report, environ)
        f"{model.path}{model.name}".encode()
        return model
    except UnicodeEncodeError as error:  # such names cannot be sent to workers and clients
        shown = name.encode(errors="surrogateescape").decode(errors="replace")
        raise ModelError(f"{shown[:200]}: the path of a model must be UTF-8; rename it") from error
    except (OSError, RuntimeError) as error:  # a name too long, a closed folder; RuntimeError: expanduser, for ~nobody
        reason = (error.strerror if isinstance(error, OSError) else "") or error
        raise ModelError(f"{name[:200]}: cannot be looked up: {reason}; {FORMS}") from error


def _resolved(name: str, part: Part, report: Callable[[str], None], environ: Mapping[str, str]) -> ResolvedModel:
    if name.startswith(HUB_PREFIX) and _HUB_ID.fullmatch(hub_id := name.removeprefix(HUB_PREFIX)):
        return ResolvedModel(_fetch_from_hub(hub_id, part, report), "safetensors", hub_id)
    path = Path(name).expanduser()
    other = {"demo": f"the built-in model, type -m {BUILT_IN_DEMO}"}.get(name, "")
    if _is_hub_id(name):
        other = f"the model of the hub, type -m {HUB_PREFIX}{name}"
    if path.is_dir():
        if other:
            report(f"using the folder ./{name}; for {other}")
        return ResolvedModel(str(path.absolute()), "safetensors", path.resolve().name or name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name}: a file that is not .gguf; {f'for {other}; ' if other else ''}{FORMS}")
        return ResolvedModel(str(path.absolute()), "gguf", path.stem)
    if name in ("demo", BUILT_IN_DEMO):
        file = demo_model_path(cache_root(environ), report, verify=part != "config")
        return ResolvedModel(str(file.absolute()), "gguf", DEMO_NAME, is_demo=True)
    if _is_hub_id(name):
        return ResolvedModel(_fetch_from_hub(name, part, report), "safetensors", name)
    raise ModelError(f"{name}: no such file or folder; {FORMS}")


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not name.lower().endswith(".gguf")


def _fetch_from_hub(name: str, part: Part, report: Callable[[str], None]) -> str:
    """Return the snapshot folder of a hub model, from the local cache if the hub fails. Never fetches code or pickles.

    HubUnreachable when the hub may answer later, else ModelError.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(f"{name}: no such folder, and without the package huggingface_hub no hub: {FORMS}") from error
    report(f"looking up {name} in the hub cache, else downloading it")
    fetch = partial(snapshot_download, name, allow_patterns=list(_FILES[part]), ignore_patterns=list(_UNWANTED_FILES))
    try:
        return str(fetch())
    except Exception as error:  # proxies, addresses and servers fail in the HTTP library's own ways, not all OSError
        kept = _cached(fetch, part)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if kept is not None:
            report(f"{name}: taken from the hub cache, because the hub did not answer: {reason}")
            return kept
        kind = HubUnreachable if may_pass(error) else ModelError
        raise kind(f"{name}: not a folder here, and the hub did not give it: {reason}. {FORMS}") from error


def _cached(fetch: Callable[..., object], part: Part) -> str | None:
    """Return the snapshot folder in the local cache; None if it lacks what is needed."""
    try:
        folder = Path(str(fetch(local_files_only=True)))
    except Exception:  # the same library; the first error is the one to tell
        return None
    return str(folder) if (folder / "config.json").is_file() and (part != "all" or has_weights(folder)) else None


def may_pass(error: BaseException) -> bool:
    """Return True if the same request to the hub may succeed later, as when the network is down."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    statuses = [getattr(getattr(each, "response", None), "status_code", None) for each in chain]
    if any(isinstance(status, int) and 400 <= status < 500 and status not in (408, 429) for status in statuses):
        return False
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    return not names & _LASTING and not any(type(each) in (ValueError, TypeError) for each in chain)


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
