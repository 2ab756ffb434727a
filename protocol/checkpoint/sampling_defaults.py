"""Read how a model is to be sampled: generation_config.json of a folder, or the metadata of a GGUF file."""

from pathlib import Path

from mgpu.protocol.checkpoint.files.gguf_file import read_gguf
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, checked_file, read_json_object, reading
from mgpu.protocol.front.client_messages import GENERATE_RULES
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.model.facts import ModelSource
from mgpu.protocol.model.sampling import SamplingDefaults

GENERATION_CONFIG = "generation_config.json"
_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GGUF_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Names in GGUF files after ``general.sampling.``."""


def read_sampling_defaults(source: ModelSource) -> SamplingDefaults:
    """Return the model's defaults. CheckpointError for values that no request may have."""
    path = Path(source.path)
    with reading(path):
        return _of_gguf(path) if source.format == "gguf" else _of_folder(path)


def _of_folder(folder: Path) -> SamplingDefaults:
    """Follow transformers: sampling is on only if ``do_sample`` says so, and then at temperature 1 if none is named."""
    if not (folder / GENERATION_CONFIG).is_file():
        return SamplingDefaults()
    path = checked_file(folder, GENERATION_CONFIG)
    fields = Fields(str(path), read_json_object(path))
    if not fields.boolean("do_sample", False):
        penalty = fields.raw("repetition_penalty") if fields.has("repetition_penalty") else None
        return _checked(str(path), {"repetition_penalty": penalty})
    found = {name: fields.raw(name) for name in _NAMES if fields.has(name)}
    return _checked(str(path), {"temperature": 1.0, **found})


def _of_gguf(path: Path) -> SamplingDefaults:
    metadata = read_gguf(path, with_arrays=False).metadata
    found = {ours: metadata.get(f"general.sampling.{theirs}") for theirs, ours in _GGUF_NAMES.items()}
    return _checked(str(path), found)


def _checked(source: str, values: dict[str, object]) -> SamplingDefaults:
    checked = {}
    for name, value in values.items():
        if value is None:
            continue
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            checked[name] = GENERATE_RULES[name].parse(name, value)
        except FieldError as error:
            raise CheckpointError(
                f"{source}: {error}; correct the file, or leave its sampling out with --generation-config none"
            ) from None
    return SamplingDefaults(**checked)  # type: ignore[arg-type]
