"""What is asked of the tensors of a GGUF file before they are entries."""

from collections.abc import Mapping
from pathlib import Path

from mgpu.protocol.checkpoint.files.gguf_file import GgufTensor
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Limit
from mgpu.protocol.model.facts import Dtype

Tensors = Mapping[str, GgufTensor]


def rows_in_table(path: Path, tensors: Tensors, name: str) -> int:
    """Return the rows of an embedding: token lists may be shorter, and `vocab_size` is often absent."""
    table = tensors.get(name)
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{path}: the tensor {name!r} is missing or not a matrix")
    if table.shape[0] > Limit.VOCAB:
        raise CheckpointError(f"{path}: a vocabulary of {table.shape[0]} is more than the {Limit.VOCAB} allowed")
    return table.shape[0]


def float_type(tensors: Tensors) -> Dtype:
    """Return the float type of the weights. Quantized ones are meant to be computed in bfloat16."""
    kinds = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) >= 2}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds and kinds <= {"F16", "F32"} else "bfloat16"
