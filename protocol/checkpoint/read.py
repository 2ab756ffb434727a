"""Read what a model is and where its tensors lie, from file headers alone. Shared by planner and loader; stdlib only.

Files come from strangers and nothing in them is trusted. Each fault raises `CheckpointError` with file and numbers.
"""

import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mgpu.protocol.checkpoint.files.safetensors_file import read_safetensors
from mgpu.protocol.checkpoint.files.tensors import (
    TensorEntry,
    check_tensors,
    dummy_tensors,
    expected_tensors,
    without_absent_biases,
)
from mgpu.protocol.checkpoint.files.untrusted import (
    CheckpointError,
    check_plain_name,
    checked_file,
    read_json_object,
    reading,
)
from mgpu.protocol.checkpoint.gguf.model import read_gguf_checkpoint
from mgpu.protocol.checkpoint.huggingface.borrowed import layer_elements, without_ignored
from mgpu.protocol.checkpoint.huggingface.borrowed_experts import with_stored_experts
from mgpu.protocol.checkpoint.huggingface.config import is_config_quantized, read_config_facts, read_config_schemes
from mgpu.protocol.checkpoint.quantized.dummy import packed_experts, quantized_dummies
from mgpu.protocol.checkpoint.quantized.formats import with_formats
from mgpu.protocol.checkpoint.quantized.join import join_packed
from mgpu.protocol.checkpoint.tensor_layout.gpt_oss import MXFP4
from mgpu.protocol.checkpoint.tensor_layout.stacked import borrowed_tensors, separate_tensors, stored_name
from mgpu.protocol.model.facts import CheckpointFormat, LoadFormat, ModelCode, ModelFacts, ModelSource

__all__ = ["Checkpoint", "CheckpointError", "TensorEntry", "expected_tensors", "read_checkpoint"]

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_PLAIN_CONSTANTS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".position_ids")
"""Ends of the names of tensors that need not be floats though nothing is quantized."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk: its facts and every tensor that it needs, under Hugging Face names."""

    source: ModelSource
    facts: ModelFacts
    tensors: dict[str, TensorEntry]


def has_weights(folder: Path) -> bool:
    """Return True if a folder holds weights of any kind, even of a kind that `read_checkpoint` refuses."""
    return any(entry.suffix.lower() in _PICKLES or ".safetensors" in entry.name for entry in folder.iterdir())


def read_checkpoint(path: str | Path, load_format: LoadFormat = "auto", code: ModelCode = "auto") -> Checkpoint:
    """Read a model folder or a ``.gguf`` file. ``dummy`` asks for config.json only; its tensors have no file.

    CheckpointError for everything wrong with the files.
    """
    path = Path(path)
    with reading(path):
        return _read(path, load_format, code)


def _read(path: Path, load_format: LoadFormat, code: ModelCode) -> Checkpoint:
    stored: dict[str, TensorEntry] = {}
    if path.is_dir():
        kind: CheckpointFormat = "safetensors"
        facts = read_config_facts(path, True, code)
        if facts.borrowed is not None:
            return _borrowed(path, facts, load_format, code)
        if load_format != "dummy":
            stored = _read_folder(path)
            stored = _join_quantized(path, facts, stored)
            stored = without_ignored(facts, stored)
            facts = _facts_of_weights(facts, stored)
            stored = separate_tensors(facts, stored)
    else:
        kind = "gguf"
        _check_gguf_path(path)
        if code == "transformers":
            raise CheckpointError(f"{path}: --model-code transformers needs a model folder, not a GGUF file")
        facts, stored = read_gguf_checkpoint(path)
    source = ModelSource(str(path.absolute()), kind, load_format, code)
    if load_format == "dummy":
        tensors = dummy_tensors(facts)
        if kind == "safetensors":
            tensors = _dummies(path, facts, tensors)
        return Checkpoint(source, with_formats(facts, tensors), tensors)
    check_tensors(str(path), facts, stored, partial(stored_name, facts.architecture))
    facts = with_formats(facts, stored)
    return Checkpoint(source, facts, {name: stored[name] for name in expected_tensors(facts)})


def _dummies(folder: Path, facts: ModelFacts, tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the entries of random weights in the formats that config.json names."""
    if not is_config_quantized(folder):
        return tensors
    if facts.architecture == "gpt_oss":
        read_config_facts(folder)  # refuses all but MXFP4
    schemes = read_config_schemes(folder, facts.architecture)
    return packed_experts(tensors, MXFP4) if schemes is None else quantized_dummies(tensors, schemes)


def _join_quantized(folder: Path, facts: ModelFacts, stored: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Join the parts of quantized matrices; gpt-oss' own experts are taken apart like other stacks.

    What is stored decides: a quantization that config.json names beside plain weights does not count.
    """
    if all(entry.dtype in _FLOATS or name.endswith(_PLAIN_CONSTANTS) for name, entry in stored.items()):
        return stored
    schemes = read_config_schemes(folder, facts.architecture)
    return stored if schemes is None else join_packed(stored, schemes)


def _borrowed(path: Path, facts: ModelFacts, load_format: LoadFormat, code: ModelCode) -> Checkpoint:
    """Read a model that transformers' code runs: which tensors it needs, only that code knows."""
    source = ModelSource(str(path.absolute()), "safetensors", load_format, code)
    if load_format == "dummy":
        return Checkpoint(source, facts, dummy_tensors(facts))
    stored = without_ignored(facts, borrowed_tensors(facts, _read_folder(path)))
    facts = with_stored_experts(str(path), facts, stored)
    assert facts.borrowed is not None
    elements = layer_elements(str(path), facts.num_layers, stored)
    tied = facts.tie_embeddings and "lm_head.weight" not in stored
    facts = replace(facts, tie_embeddings=tied, borrowed=replace(facts.borrowed, layer_elements=elements))
    return Checkpoint(source, facts, stored)


def _facts_of_weights(facts: ModelFacts, stored: dict[str, TensorEntry]) -> ModelFacts:
    """Correct the facts by what is stored, as transformers does."""
    # A stored head is used, whatever config.json says.
    facts = replace(facts, tie_embeddings=facts.tie_embeddings and "lm_head.weight" not in stored)
    return without_absent_biases(facts, stored)


def _check_gguf_path(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if not path.is_file() or path.suffix.lower() != ".gguf":
        raise CheckpointError(f"{path}: neither a model folder nor a .gguf file{_pickle_hint([path])}")


def _read_folder(folder: Path) -> dict[str, TensorEntry]:
    """Read the headers of all shards; tensors keep their names but for a multimodal prefix.

    As in transformers, the index only says which files belong to the model, and one whole file goes before it. Of a
    tensor in two files the last counts.
    """
    indexed = _read_index(folder) if (folder / _INDEX).exists() else []
    shards = _find_shards(folder) if not indexed or os.path.lexists(folder / _WHOLE) else indexed
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_safetensors(checked_file(folder, shard)).items():
            text_name = _text_name(name)
            if text_name in tensors and not indexed:
                raise CheckpointError(f"{entry.file}: tensor {name!r} is also in {tensors[text_name].file}")
            tensors[text_name] = replace(entry, name=text_name)
    return tensors


_WITHOUT_MODEL = ("embed_tokens.", "embed_tokens_per_layer.", "per_layer_", "layers.", "norm.")


def _text_name(name: str) -> str:
    """Return the name that a text-only model with a head would use.

    Gemma 3's multimodal checkpoints wrap it in two ways, and a model saved without its head has no ``model.``.
    """
    for prefix, plain in (("language_model.", ""), ("model.language_model.", "model.")):
        if name.startswith(prefix):
            name = plain + name[len(prefix) :]
            break
    return f"model.{name}" if name.startswith(_WITHOUT_MODEL) else name


def _read_index(folder: Path) -> list[str]:
    """Return the files that the index names, in the order in which transformers reads them."""
    path = checked_file(folder, _INDEX)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        check_plain_name(folder, shard)
    return shards


def _find_shards(folder: Path) -> list[str]:
    """Name the weight files of a folder without index: one file, or a complete set of numbered ones."""
    if os.path.lexists(folder / _WHOLE):
        return [_WHOLE]
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors")
    names = [name for name in names if not name.startswith("consolidated")] or names
    if not names:
        raise CheckpointError(f"{folder}: no .safetensors weights{_pickle_hint(list(folder.iterdir()))}")
    totals = {int(match[1]) for name in names if (match := re.search(r"-of-(\d{1,6})\.safetensors$", name))}
    if totals and totals != {len(names)}:
        raise CheckpointError(
            f"{folder}: {len(names)} weight files, but their names say {max(totals)}; some are missing"
        )
    return names


def _pickle_hint(paths: list[Path]) -> str:
    pickled = sorted(path.name for path in paths if path.suffix.lower() in _PICKLES)
    if not pickled:
        return ""
    return (
        f"; {pickled[0]!r} can run code when it is read, so it never is. Convert it once where you trust it: "
        "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)` with transformers"
    )
