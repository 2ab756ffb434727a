"""Take the experts of gpt-oss apart: gate and up rows take turns, and are stored transposed, or as MXFP4.

Transposed: `gate_up_proj` [E, D, 2 F] and `down_proj` [E, F, D]. MXFP4: `gate_up_proj_blocks` [E, 2 F, D / 32, 16],
two values of four bits to a byte, and `gate_up_proj_scales` [E, 2 F, D / 32], an exponent to a block; `down_proj`
alike. Biases: [E, 2 F] and [E, D].
"""

from collections.abc import Mapping
from dataclasses import replace

from mgpu.protocol.checkpoint.files.tensors import PackedParts, TensorEntry, check_shape
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.weight_format import WeightFormat

MXFP4 = WeightFormat("fp4", 32, scale_bytes=1, source="MXFP4")
_BLOCK, _BLOCK_BYTES = 32, 16


def gpt_oss_tensors(
    facts: ModelFacts, name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry] | None:
    """Return the parts of one tensor of all experts; none of scales, which their blocks need; None if it is another."""
    head, _, last = name.rpartition(".")
    stacked, _, kind = last.partition("_proj")
    if stacked not in ("gate_up", "down") or facts.experts is None:
        return None
    hidden, width, count = facts.hidden_size, facts.experts.width, facts.experts.count
    outputs, inputs = (2 * width, hidden) if stacked == "gate_up" else (hidden, width)
    if kind == "_scales":
        if (blocks := f"{head}.{stacked}_proj_blocks") not in tensors:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has no {blocks!r} beside it; download the folder again"
            )
        return {}
    if kind == "":
        check_shape(entry, (count, inputs, outputs))
        parts = [_transposed(entry, expert, outputs, inputs) for expert in range(count)]
    elif kind == "_bias":
        check_shape(entry, (count, outputs))
        parts = [_part(entry, expert, (outputs,), entry.nbytes // count) for expert in range(count)]
    elif kind == "_blocks":
        scales = _scales_of(name, entry, tensors)
        check_shape(entry, (count, outputs, inputs // _BLOCK, _BLOCK_BYTES))
        check_shape(scales, (count, outputs, inputs // _BLOCK))
        parts = [_mxfp4(entry, scales, expert, outputs, inputs) for expert in range(count)]
    else:
        return None
    end = "bias" if kind == "_bias" else "weight"
    found = {}
    for expert, part in enumerate(parts):
        for projection, piece in _turns(part) if stacked == "gate_up" else (("down_proj", part),):
            found[f"{head}.{expert}.{projection}.{end}"] = piece
    return found


def _part(entry: TensorEntry, expert: int, shape: tuple[int, ...], nbytes: int) -> TensorEntry:
    return replace(entry, shape=shape, offset=entry.offset + expert * nbytes, nbytes=nbytes)


def _transposed(entry: TensorEntry, expert: int, outputs: int, inputs: int) -> TensorEntry:
    part = _part(entry, expert, (outputs, inputs), entry.nbytes // entry.shape[0])
    return replace(part, is_transposed=True, stored_columns=outputs)


def _mxfp4(entry: TensorEntry, scales: TensorEntry, expert: int, outputs: int, inputs: int) -> TensorEntry:
    blocks, count = inputs // _BLOCK, entry.shape[0]
    values = _part(entry, expert, (outputs, blocks * _BLOCK_BYTES), entry.nbytes // count)
    exponents = _part(scales, expert, (outputs, blocks), scales.nbytes // count)
    parts = PackedParts(MXFP4, "mxfp4", 4, values, exponents)
    nbytes = values.nbytes + exponents.nbytes
    return replace(values, dtype="MXFP4", shape=(outputs, inputs), nbytes=nbytes, packed=parts)


def _scales_of(name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    scales = tensors.get(name.replace("_blocks", "_scales"))
    if scales is None or scales.dtype != "U8" or entry.dtype != "U8":
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name!r} has no scales of type U8 beside it; download the folder again"
        )
    return scales


def _turns(part: TensorEntry) -> tuple[tuple[str, TensorEntry], ...]:
    """Return gate and up, whose rows take turns."""
    rows = part.shape[0] // 2
    if part.packed is not None:
        gate, up = (replace(part.packed, first_row=first, row_step=2) for first in (0, 1))
        half = replace(part, shape=(rows, part.shape[1]), nbytes=part.nbytes // 2)
        return ("gate_proj", replace(half, packed=gate)), ("up_proj", replace(half, packed=up))
    step = part.nbytes // part.shape[0]  # from one row to the next
    if part.is_transposed:
        step //= part.shape[1]  # from one column to the next
    half = replace(part, shape=(rows, *part.shape[1:]), nbytes=part.nbytes // 2, row_step=2)
    return ("gate_proj", half), ("up_proj", replace(half, offset=part.offset + step))
