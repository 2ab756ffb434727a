"""Say how matrices of a GGUF file are held: packed, with the numbers of the file.

Each type of blocks becomes words of codes, and the scales and offsets of their groups as they are stored. Nothing is
rounded: K-quants keep the integers that scale groups of 16 or 32, and the float16 that scale those.
"""

import math
from dataclasses import replace

from mgpu.protocol.checkpoint.files.tensors import PackedParts, TensorEntry
from mgpu.protocol.model.weight_format import HeldQuant, WeightFormat


def _plain(name: str, quant: HeldQuant, scale_bytes: int = 2, offset_bytes: int = 0) -> WeightFormat:
    """Return the format of a type with blocks of 32."""
    source = f"GGUF {name}"
    return WeightFormat(quant, 32, scale_bytes=scale_bytes, source=source, offset_bytes=offset_bytes, block=32)


def _nested(name: str, quant: HeldQuant, group: int, super_bytes: int, offset_bytes: int = 0) -> WeightFormat:
    """Return the format of a type with blocks of 256, whose groups have scales of a byte."""
    source = f"GGUF {name}"
    return WeightFormat(
        quant, group, scale_bytes=1, source=source, offset_bytes=offset_bytes, super_bytes=super_bytes, block=256
    )


GGUF_FORMATS: dict[str, WeightFormat] = {
    "Q4_0": _plain("Q4_0", "4"),
    "Q4_1": _plain("Q4_1", "4", offset_bytes=2),
    "Q5_0": _plain("Q5_0", "5"),
    "Q5_1": _plain("Q5_1", "5", offset_bytes=2),
    "Q8_0": _plain("Q8_0", "8"),
    "IQ4_NL": _plain("IQ4_NL", "nl4"),
    "MXFP4": _plain("MXFP4", "fp4", scale_bytes=1),
    "Q2_K": _nested("Q2_K", "2", 16, 4),
    "Q3_K": _nested("Q3_K", "3", 16, 2),
    "Q4_K": _nested("Q4_K", "4", 32, 4, offset_bytes=1),
    "Q5_K": _nested("Q5_K", "5", 32, 4, offset_bytes=1),
    "Q6_K": _nested("Q6_K", "6", 16, 2),
    "IQ4_XS": _nested("IQ4_XS", "nl4", 32, 2),
}
"""By the type's name in the file."""


def packed_entry(entry: TensorEntry) -> TensorEntry:
    """Return a stored matrix with what it takes to hold it packed; any other tensor as it is."""
    form = GGUF_FORMATS.get(entry.dtype)
    if form is None or len(entry.shape) < 2:
        return entry
    rows = math.prod(entry.shape[:-1])
    blocks = replace(entry, dtype="U8", shape=(rows, entry.nbytes // rows))
    return replace(entry, packed=PackedParts(form, "gguf", 8, blocks, blocks))
