"""Tell two models apart by their headers and a few samples, so that hosts that read their own files can be compared.

A base model and its tuned version can have the same configuration and the same tensors by name and shape. So a few
bytes of some tensors count too: 8 KiB of a model of any size.
"""

from hashlib import sha256
from pathlib import Path

from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, reading
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import TensorEntry, has_weights, read_checkpoint
from mgpu.protocol.model.fingerprint import ModelPrint

_DIGITS = 16
_MOST_SAMPLES = 32
_SAMPLE_BYTES = 256


def model_print(path: str) -> ModelPrint:
    """Return what identifies the model in a folder or a GGUF file. CheckpointError if it cannot be read.

    Where the files lie does not count. A folder without weights has a print of its config.json only.
    """
    place = Path(path)
    is_folder = place.is_dir()
    with reading(place):
        if is_folder and not has_weights(place):
            return ModelPrint(str(place.absolute()), _digest(repr(read_config_facts(place, True))), "")
        checkpoint = read_checkpoint(place)
        facts = read_config_facts(place, True) if is_folder else checkpoint.facts
        return ModelPrint(str(place.absolute()), _digest(repr(facts)), _of_tensors(checkpoint.tensors))


def _of_tensors(tensors: dict[str, TensorEntry]) -> str:
    names = sorted(tensors)
    lines = [f"{name} {tensors[name].dtype} {tensors[name].shape} {tensors[name].nbytes}" for name in names]
    plain = [tensors[name] for name in names if tensors[name].packed is None and tensors[name].file]
    samples = [_sample(entry) for entry in plain[:: max(1, -(-len(plain) // _MOST_SAMPLES))]]
    return _digest("\n".join([*lines, *samples]))


def _sample(entry: TensorEntry) -> str:
    try:
        with open(entry.file, "rb") as file:
            file.seek(entry.offset + entry.nbytes // 2)
            return file.read(min(_SAMPLE_BYTES, entry.nbytes - entry.nbytes // 2)).hex()
    except OSError as error:
        raise CheckpointError(f"{entry.file}: cannot be read: {error.strerror}") from None


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:_DIGITS]
