"""Say what a quantized folder would store, from its configuration alone: for random weights in its formats."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from mgpu.protocol.checkpoint.files.tensors import PackedParts, TensorEntry
from mgpu.protocol.checkpoint.quantized.config import Scheme, SchemeOf
from mgpu.protocol.checkpoint.quantized.join import join_packed
from mgpu.protocol.model.weight_format import WeightFormat

_BYTES = {"F8_E4M3": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4}
_LINEAR = "_proj.weight", "_proj_with_mqa.weight"


def quantized_dummies(tensors: Mapping[str, TensorEntry], scheme_of: SchemeOf) -> dict[str, TensorEntry]:
    """Return entries without a file, the linear layers of decoder layers in the formats of their schemes.

    CheckpointError for sizes that a scheme cannot have, as for the same folder with weights.
    """
    found: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        module = name.removesuffix(".weight")
        scheme = scheme_of(module) if name.startswith("model.layers.") and name.endswith(_LINEAR) else None
        parts = [(name, entry)] if scheme is None else _stored(module, scheme, *entry.shape)
        found |= dict(parts)
    return join_packed(found, scheme_of)


def packed_experts(tensors: Mapping[str, TensorEntry], form: WeightFormat) -> dict[str, TensorEntry]:
    """Return the entries with all experts in one format, as gpt-oss has them."""
    return {
        name: replace(entry, packed=PackedParts(form, "mxfp4", 4, entry, entry))
        if ".experts." in name and name.endswith(_LINEAR)
        else entry
        for name, entry in tensors.items()
    }


def _stored(module: str, scheme: Scheme, outputs: int, inputs: int) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the stored tensors of one matrix."""
    per_word, group = 32 // scheme.bits, scheme.group or inputs
    groups = -(-inputs // group)

    def part(end: str, dtype: str, *shape: int) -> tuple[str, TensorEntry]:
        name = f"{module}.{end}"
        return name, TensorEntry(name, dtype, shape, "", 0, math.prod(shape) * _BYTES[dtype])

    if scheme.packing == "rows":
        yield part("weight", "F8_E4M3" if scheme.is_float else "I8", outputs, inputs)
        rows, columns = scheme.block or (1, group)
        yield part("weight_scale", "F32", -(-outputs // rows), -(-inputs // columns))
    elif scheme.packing == "words":
        yield part("weight_packed", "I32", outputs, -(-inputs // per_word))
        yield part("weight_scale", "BF16", outputs, groups)
    elif scheme.packing == "gptq":
        yield part("qweight", "I32", -(-inputs // per_word), outputs)
        yield part("scales", "F16", groups, outputs)
    else:
        yield part("qweight", "I32", inputs, -(-outputs // per_word))
        yield part("scales", "F16", groups, outputs)
    words = -(-outputs // per_word)
    if scheme.has_zeros and scheme.packing == "rows":
        yield part("weight_zero_point", "I8", outputs, groups)
    elif scheme.has_zeros:
        is_words = scheme.packing == "words"
        yield part("weight_zero_point", "I32", words, groups) if is_words else part("qzeros", "I32", groups, words)
    if scheme.is_ordered and scheme.group:
        yield part("g_idx" if scheme.packing == "gptq" else "weight_g_idx", "I32", inputs)
