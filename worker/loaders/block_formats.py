"""How each tensor type packs numbers into blocks, and how blocks are decoded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.files.tensors import BLOCKS
from mgpu.protocol.checkpoint.read import CheckpointError

PLAIN_TYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip

NUMBERS: dict[str, torch.dtype] = PLAIN_TYPES | {
    "I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "F8_E4M3": torch.uint8,
    "F8_E8M0": torch.uint8,
}  # fmt: skip
"""How the parts of packed matrices are read; float8 as bytes."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """``elements`` numbers take ``bytes`` bytes; ``decode`` turns uint8 [rows, bytes] into numbers [rows, columns]."""

    elements: int
    bytes: int
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None
    """The dtype of plain types, whose bytes are the numbers; None for quantized ones."""


def block_type(name: str) -> BlockType:
    """Return a tensor type by its safetensors or GGUF name. KeyError for a type that cannot be read."""
    if name in PLAIN_TYPES:
        dtype = PLAIN_TYPES[name]
        return BlockType(1, dtype.itemsize, lambda raw: raw.view(dtype), dtype)
    elements, size = BLOCKS[name]
    return BlockType(elements, size, partial(_dequantize, name))


def _dequantize(name: str, raw: Tensor) -> Tensor:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(f"reading {name} tensors needs the gguf package; type: pip install gguf") from error
    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[name]))
