"""How each tensor type packs numbers into blocks, and how blocks are decoded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.read import CheckpointError

PLAIN_TYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# name: elements and bytes per block, from ggml's ggml-common.h
QUANTIZED_TYPES: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}


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
    elements, size = QUANTIZED_TYPES[name]
    return BlockType(elements, size, partial(_dequantize, name))


def _dequantize(name: str, raw: Tensor) -> Tensor:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(f"reading {name} tensors needs the gguf package; type: pip install gguf") from error
    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[name]))
