"""Find the model that ``-m`` names: a folder, a .gguf file, the demo model, or a model of the Hugging Face hub."""

import contextlib
import difflib
import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.models.demo import DEMO_NAME, demo_model_path
from mgpu.orchestrator.models.hub_files import Part
from mgpu.orchestrator.models.hub_names import HUB_PREFIX, HubName, parse_hub_name
from mgpu.protocol.cache_root import cache_root
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, has_weights, read_checkpoint
from mgpu.protocol.model.facts import CheckpointFormat, LoadFormat, ModelCode

_PLAIN_TYPES = ("F32", "F16", "BF16")
"""Tensor types that torch reads by itself."""
FORMS = (
    "-m takes a model folder (config.json, *.safetensors, tokenizer.json), a .gguf file, `demo`, or a hub id such as "
    "Qwen/Qwen3-0.6B or ORG/NAME-GGUF:Q4_K_M"
)
BUILT_IN_DEMO = "builtin:demo"
"""How to name the demo where a folder has the same name."""
DEMO_NAMES = ("demo", BUILT_IN_DEMO)
_MOST_BESIDE = 1000
"""Names of a folder that are compared with one that is not there."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine. ``path`` is absolute: a folder, or a file for GGUF."""

    path: str
    format: CheckpointFormat
    name: str
    """Its name for clients and logs."""
    is_demo: bool = False
    """True: it runs on any machine, if need be on some of the GPUs."""


def resolve_model(
    name: str,
    *,
    part: Part = "all",
    report: Callable[[str], None] = lambda line: None,
    environ: Mapping[str, str] = os.environ,
    offline: bool = False,
) -> ResolvedModel:
    """Find a model, fetching the demo or a model of the hub. ModelError lists the forms that -m takes.

    ``part`` is what the caller needs of a hub model: dummy weights and planning need less. ``report`` gets a line
    before anything is fetched. ``offline`` fetches nothing: the model must be on this machine.
    """
    check_name(name, environ)
    try:
        model = _resolved(name, part, report, environ, offline)
        f"{model.path}{model.name}".encode()
        return model
    except UnicodeEncodeError as error:  # such names cannot be sent to workers and clients
        shown = name.encode(errors="surrogateescape").decode(errors="replace")
        raise ModelError(f"{shown[:200]}: the path of a model must be UTF-8; rename it") from error
    except (OSError, RuntimeError) as error:  # a name too long, a closed folder; RuntimeError: expanduser, for ~nobody
        reason = (error.strerror if isinstance(error, OSError) else "") or error
        raise ModelError(f"{name[:200]}: cannot be looked up: {reason}; {FORMS}") from error


def check_name(name: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ModelError if a name is that of nothing on this machine and can be none of the hub. Fetches nothing."""
    if not name.strip():
        raise ModelError(f"no model is named; {FORMS}")
    with contextlib.suppress(OSError, RuntimeError):  # names that cannot be looked up: `resolve_model` says why
        is_here = Path(name).expanduser().exists()
        if not is_here and name not in DEMO_NAMES and not parse_hub_name(name, environ.get("HF_ENDPOINT", "")):
            raise _nothing_there(name)


def _nothing_there(name: str) -> ModelError:
    """Return the error that names what lies beside a name that was mistyped."""
    typed, beside = name.rpartition("/")[2], [] if "/" in name else list(DEMO_NAMES)
    with contextlib.suppress(OSError, RuntimeError):  # the folder may be the mistake
        folder = Path(name).expanduser().parent
        beside += [each.name for each in itertools.islice(folder.iterdir(), _MOST_BESIDE) if each.name.isprintable()]
    near = difflib.get_close_matches(typed, beside, n=1)
    hint = f"did you mean {name.removesuffix(typed)}{near[0]}? " if near else ""
    return ModelError(f"{name}: no such file or folder; {hint}{FORMS}")


def _resolved(
    name: str, part: Part, report: Callable[[str], None], environ: Mapping[str, str], offline: bool
) -> ResolvedModel:
    if name.startswith(HUB_PREFIX) and (of_hub := parse_hub_name(name, environ.get("HF_ENDPOINT", ""))):
        return _from_hub(of_hub, part, report, offline)
    path = Path(name).expanduser()
    if found := _on_this_machine(name, path, report):
        return found
    if name in DEMO_NAMES:
        file = demo_model_path(cache_root(environ), report, verify=part != "config", offline=offline)
        return ResolvedModel(str(file.absolute()), "gguf", DEMO_NAME, is_demo=True)
    if of_hub := parse_hub_name(name, environ.get("HF_ENDPOINT", "")):
        return _from_hub(of_hub, part, report, offline)
    raise _nothing_there(name)


def _on_this_machine(name: str, path: Path, report: Callable[[str], None]) -> ResolvedModel | None:
    """Return the folder or file of a name. Say so if the name is also that of another model."""
    is_folder = path.is_dir()
    if not is_folder and not path.is_file():
        return None
    other = f"the built-in model, type -m {BUILT_IN_DEMO}" if name == "demo" else ""
    if "://" not in name and parse_hub_name(name):
        other = f"the model of the hub, type -m {HUB_PREFIX}{name}"
    if is_folder:
        if other:
            report(f"using the folder ./{name}; for {other}")
        return ResolvedModel(str(path.absolute()), "safetensors", path.resolve().name or name)
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{name}: a file that is not .gguf; {f'for {other}; ' if other else ''}{FORMS}")
    return ResolvedModel(str(path.absolute()), "gguf", path.stem)


def _from_hub(name: HubName, part: Part, report: Callable[[str], None], offline: bool) -> ResolvedModel:
    try:
        from mgpu.orchestrator.models.hub import fetch_model
    except ImportError as error:
        raise ModelError(f"{name}: no such folder, and without the package huggingface_hub no hub: {FORMS}") from error
    found = fetch_model(name, part, report, offline)
    if found.path.is_dir():
        return ResolvedModel(str(found.path), "safetensors", name.repo)
    shown = f"{name.repo}:{name.quant}" if name.quant else Path(name.file).stem if name.file else name.repo
    return ResolvedModel(str(found.path), "gguf", shown)


def read_model(model: ResolvedModel, load_format: LoadFormat = "auto", code: ModelCode = "auto") -> Checkpoint:
    """Read the headers of a resolved model. ModelError when the files cannot be used."""
    try:
        return read_checkpoint(model.path, load_format, code)
    except CheckpointError as error:
        raise ModelError(str(error)) from error


def check_loadable(checkpoint: Checkpoint) -> None:
    """Raise ModelError when the model needs a package that is not installed."""
    facts = checkpoint.facts
    if facts.borrowed is not None and importlib.util.find_spec("transformers") is None:
        raise ModelError(
            f"transformers' code runs {facts.architecture} models, and that library is not installed; type: "
            "pip install 'mgpu[transformers]'"
        )
    blocks = sorted({entry.dtype for entry in checkpoint.tensors.values() if entry.dtype not in _PLAIN_TYPES})
    if blocks and checkpoint.source.format == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {', '.join(blocks)} tensors needs the gguf package; type: pip install gguf")


def read_model_to_plan(model: ResolvedModel, load_format: LoadFormat = "auto", code: ModelCode = "auto") -> Checkpoint:
    """Read a model to plan it. Its weights may be absent: a folder with config.json alone is enough."""
    if load_format == "dummy":
        return read_model(model, load_format, code)
    try:
        is_complete = model.format == "gguf" or has_weights(Path(model.path))
    except OSError as error:
        raise ModelError(f"{model.path}: cannot be read: {error.strerror or error}") from error
    return read_model(model, "auto" if is_complete else "dummy", code)
