"""Choose the files of a repository that mgpu needs. Pure: names in, names out."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.models.hub_names import HubName

Part = Literal["all", "no weights", "config"]
"""What of a folder is needed: planning and dummy weights need less."""
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_CONFIG = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<ending>\.[A-Za-z]+)")
_TAG = re.compile(r"(?<![A-Za-z0-9])(?:(?:UD-)?I?Q[1-9]\w*|T?Q[1-9]_\w+|MXFP4\w*|NVFP4|BF16|F16|F32)$", re.IGNORECASE)
"""The quantization at the end of a file's name."""
_COMPANIONS = ("mmproj", "imatrix")
"""GGUF files that are no model: the encoder of images, and statistics for quantizing."""


def is_gguf_wanted(name: HubName, files: Collection[str]) -> bool:
    """Return True if the model is a GGUF file of the repository, and not its safetensors."""
    return bool(name.file or name.quant) or ("config.json" not in files and any(map(_is_model_file, files)))


def small_files(name: HubName, files: Collection[str], part: Part) -> list[str]:
    """List configuration and tokenizer, and the index of the weights. ModelError without config.json or weights."""
    if "config.json" not in files:
        raise ModelError(f"{name}: no model that mgpu can load: the repository has neither config.json nor .gguf files")
    if part != "all":
        return [file for file in (*_CONFIG, *(_TOKENIZER if part == "no weights" else ())) if file in files]
    if not _stored(files):
        raise ModelError(f"{name}: {_no_weights(name, files)}")
    wanted = (*_CONFIG, *_TOKENIZER, *(() if WHOLE in files else (INDEX,)))
    return [file for file in wanted if file in files]


def _no_weights(name: HubName, files: Collection[str]) -> str:
    models = sorted(filter(_is_model_file, files))
    if models:
        return f"no .safetensors weights, but GGUF files. Name one: {_choices(name, _groups(models))}"
    pickles = sorted(file for file in files if file.endswith(_PICKLES))
    if pickles:
        return (
            f"no .safetensors weights, only {', '.join(pickles[:3])}: mgpu loads no pickles. Often a revision such as "
            f"{name.repo}@refs/pr/1 or a repository {name.repo}-GGUF has others"
        )
    return f"no weights: neither .safetensors nor .gguf among its {len(files)} files"


def _stored(files: Collection[str]) -> list[str]:
    return sorted(
        file
        for file in files
        if file.endswith(".safetensors") and "/" not in file and not file.startswith(("consolidated", "adapter_"))
    )


def weight_files(name: HubName, files: Collection[str], weight_map: Mapping[str, object] | None) -> list[str]:
    """List the safetensors of a model: one whole file, those of the index, or all. ModelError if one is absent."""
    if WHOLE in files:
        return [WHOLE]
    wanted = _stored(files)
    if weight_map is not None:
        wanted = sorted({str(file) for file in weight_map.values()})
    for file in list(wanted):
        wanted += [part for part in split_parts(file) if part not in wanted and weight_map is None]
    absent = [file for file in wanted if file not in files]
    if absent or not wanted:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ModelError(f"{name}: {(absent or ['the weights'])[0]}{more} of {len(wanted)} weight files is not there")
    return wanted


def gguf_files(name: HubName, files: Collection[str], sizes: Mapping[str, int] | None = None) -> list[str]:
    """List the GGUF file that is named, or all parts of it, the first one first.

    ModelError when there is none, or when several have the quantization: it lists them, with ``sizes`` if given.
    """
    models = sorted(filter(_is_model_file, files))
    if name.file:
        if name.file not in files:
            listed = f" It has {_choices(name, _groups(models), sizes)}" if models else ""
            raise ModelError(f"{name}: {name.repo} has no file {name.file}.{listed}")
        models = [name.file]
    groups = _groups(models)
    if name.quant:
        groups = {key: group for key, group in groups.items() if _has_quant(key, name.quant)}
    if not groups:
        raise ModelError(f"{name}: {_no_such_quant(name, models, sizes)}")
    if len(groups) > 1:
        which = f"several files are {name.quant}" if name.quant else "the repository has several GGUF files"
        raise ModelError(f"{name}: {which}. Name one: {_choices(name, groups, sizes)}")
    [group] = groups.values()
    absent = [part for part in split_parts(group[0]) if part not in files]
    if absent:
        raise ModelError(f"{name}: {absent[0]} is not there, one of {len(split_parts(group[0]))} parts of the model")
    return split_parts(group[0]) or group


def _no_such_quant(name: HubName, models: list[str], sizes: Mapping[str, int] | None) -> str:
    if models:
        return f"no GGUF file of {name.repo} is {name.quant}. It has {_choices(name, _groups(models), sizes)}"
    return f"{name.repo} has no GGUF files; without :{name.quant}, --quant 8, 4 or fp8 quantizes while loading"


def _is_model_file(file: str) -> bool:
    base = file.rsplit("/", 1)[-1].lower()
    return base.endswith(".gguf") and not any(word in base for word in _COMPANIONS)


def split_parts(file: str) -> list[str]:
    """List all parts of a file that is split over several; empty for a whole file."""
    match = _SPLIT.fullmatch(file)
    if match is None or not 1 <= int(match["count"]) <= 9999:
        return []
    count = int(match["count"])
    return [f"{match['stem']}-{part:05}-of-{match['count']}{match['ending']}" for part in range(1, count + 1)]


def _groups(models: Collection[str]) -> dict[str, list[str]]:
    """Collect the parts of each model under its name without ending and number of the part."""
    groups: dict[str, list[str]] = {}
    for file in sorted(models):
        match = _SPLIT.fullmatch(file)
        groups.setdefault(match["stem"] if match else file[: -len(".gguf")], []).append(file)
    return groups


def _has_quant(stem: str, quant: str) -> bool:
    """Return True if a name without ending has a quantization as a word of its own: Q4_K is not Q4_K_M or IQ4_K."""
    base = stem.rsplit("/", 1)[-1]
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", base, re.IGNORECASE) is not None


def _choices(name: HubName, groups: Mapping[str, list[str]], sizes: Mapping[str, int] | None = None) -> str:
    """List what can be typed instead, the shortest way for each, with sizes."""
    listed = []
    for stem, group in list(groups.items())[:24]:
        tag = _TAG.search(stem)
        is_enough = tag is not None and sum(_has_quant(other, tag[0]) for other in groups) == 1
        short = replace(name, file="", quant=tag[0]) if is_enough and tag else replace(name, file=group[0], quant="")
        size = sum((sizes or {}).get(file, 0) for file in group)
        listed.append(str(short) + (f" ({size / 1e9:.1f} GB)" if size else ""))
    more = f" and {len(groups) - 24} more" if len(groups) > 24 else ""
    return ", ".join(listed) + more
