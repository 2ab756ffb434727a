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

MXFP4_VALUES, MXFP4_BYTES = 32, 16
_E2M1 = torch.tensor([sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
"""What the four bits of an MXFP4 value stand for: the highest is the sign."""


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
    if name == "MXFP4":
        return BlockType(MXFP4_VALUES, MXFP4_BYTES, _mxfp4_values)
    elements, size = BLOCKS[name]
    return BlockType(elements, size, partial(_dequantize, name))


def _mxfp4_values(raw: Tensor) -> Tensor:
    """Return the numbers of blocks before they are scaled: of each byte the low half, then the high one."""
    codes = torch.stack((raw & 15, raw >> 4), dim=-1).flatten(1)
    return _E2M1[codes.int()]


def scale_mxfp4(values: Tensor, exponents: Tensor) -> Tensor:
    """Multiply each block of [rows, numbers] by its power of two, stored as uint8 [rows, blocks] with a bias of 127."""
    blocks = values.view(*exponents.shape, MXFP4_VALUES)
    return torch.ldexp(blocks, (exponents.int() - 127).unsqueeze(-1)).view(values.shape)


def _dequantize(name: str, raw: Tensor) -> Tensor:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(f"reading {name} tensors needs the gguf package; type: pip install gguf") from error
    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[name]))
