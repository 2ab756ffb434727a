"""Turn the header of a GGUF file into `ModelFacts` and tensors under their Hugging Face names."""

import re
from pathlib import Path

from mgpu.protocol.checkpoint.files.gguf_file import MAX_HEADER_BYTES, MAX_TENSORS, GgufHeader, read_gguf
from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, checked_file
from mgpu.protocol.checkpoint.gguf.facts import gguf_facts
from mgpu.protocol.checkpoint.gguf.families import ARCHITECTURES
from mgpu.protocol.checkpoint.gguf.names import stored_entries
from mgpu.protocol.checkpoint.gguf.tokens import end_tokens
from mgpu.protocol.checkpoint.huggingface.borrowed import without_ignored
from mgpu.protocol.checkpoint.rope.gguf import Located
from mgpu.protocol.checkpoint.tensor_layout.stacked import taken_apart
from mgpu.protocol.model.facts import ModelFacts

_TOKENS = "tokenizer.ggml.tokens"


def read_gguf_checkpoint(path: Path) -> tuple[ModelFacts, dict[str, TensorEntry]]:
    """Read facts and tensor index of a GGUF model. CheckpointError when it cannot be served."""
    header = read_gguf(path, with_arrays=False, kept=(_TOKENS,))
    fields = Fields(str(path), header.metadata)
    others = _other_parts(path, fields)
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: the architecture is {architecture[:80]!r}; supported in GGUF files: {', '.join(ARCHITECTURES)}"
        )
    located = _all_tensors(path, header, others)
    tokenizer = Fields(str(path), header.metadata, "tokenizer.ggml.")
    tokens = next(iter(tokenizer.token_ids("bos_token_id")), None), end_tokens(tokenizer)
    facts = gguf_facts(path, architecture, header.metadata, located, *tokens)
    return facts, taken_apart(facts, without_ignored(facts, stored_entries(facts, located)))


def _all_tensors(path: Path, header: GgufHeader, others: list[Path]) -> Located:
    """Return the tensors of all parts of a model with their files. CheckpointError if the parts do not fit together."""
    located: Located = {}
    nbytes = 0
    for index, part in enumerate((path, *others)):
        found = read_gguf(part, with_arrays=False) if index else header
        nbytes += found.nbytes
        if nbytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{part}: {nbytes} bytes of headers up to this part; at most {MAX_HEADER_BYTES}")
        _check_part(part, found, index, 1 + len(others))
        for name, tensor in found.tensors.items():
            if name in located:
                raise CheckpointError(f"{part}: tensor {name!r} is also in {located[name][0]}")
            located[name] = part, tensor
        if len(located) > MAX_TENSORS:
            raise CheckpointError(f"{part}: {len(located)} tensors up to this part; at most {MAX_TENSORS} are allowed")
    claimed = Fields(str(path), header.metadata).integer("split.tensors.count", len(located), low=0, high=MAX_TENSORS)
    if claimed != len(located):
        raise CheckpointError(f"{path}: split.tensors.count is {claimed}, and all parts have {len(located)} tensors")
    return located


def _check_part(path: Path, header: GgufHeader, index: int, count: int) -> None:
    """Raise CheckpointError for a part of another model, or one whose tensors are not all of its data."""
    fields = Fields(str(path), header.metadata)
    for key, expected in (("split.no", index), ("split.count", count)) if count > 1 else ():
        if (found := fields.integer(key, expected, low=0)) != expected:
            raise fields.error(key, f"is {found}; {expected} was expected in part {index + 1} of {count}")
    if header.trailing_bytes:
        raise CheckpointError(
            f"{path}: {header.trailing_bytes} bytes follow the last tensor: its type is not what the header says, "
            "or the file is corrupt; download it again"
        )


def _other_parts(path: Path, fields: Fields) -> list[Path]:
    """Return the further files of a model that is split over several; ``path`` must be the first."""
    count = fields.integer("split.count", 1, low=0, high=9999)
    if count <= 1:
        return []
    match = re.fullmatch(r"(.*)-00001-of-([0-9]{5})\.gguf", path.name)
    if match is None or int(match[2]) != count:
        raise CheckpointError(
            f"{path}: one of {count} parts of a model; name the first, which ends in -00001-of-{count:05}.gguf"
        )
    return [checked_file(path.parent, f"{match[1]}-{part:05}-of-{count:05}.gguf") for part in range(2, count + 1)]
