"""Read one rank's part of packed matrices, and pack it into the words that products take."""

# N outputs, K inputs, G groups, S stacked matrices

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.files.tensors import PackedParts
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.loaders.gguf_blocks import check_finite, unpack_blocks
from mgpu.worker.loaders.unpack import ReadBlock, Unpacked, read_order, unpack_rows
from mgpu.worker.quantization.packing import KIND_OF, PackedWeight, nibble_words, octet_words

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 23}
"""Weights that are unpacked at once. They take a few bytes each on the way; a GPU is waited for once a chunk."""

T = TypeVar("T")


class InOrder(Protocol):
    """Calls functions, maybe several at once, and returns their results in order."""

    def __call__(self, calls: Iterable[Callable[[], T]], /) -> Iterator[T]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows and columns of one packed matrix."""

    parts: PackedParts
    rows: range
    columns: range
    more_columns: tuple[range, ...] = ()
    """Further ranges of columns, whole blocks of a GGUF file."""


def one_by_one(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    return (call() for call in calls)


def read_packed(
    pieces: Sequence[Piece],
    read: ReadBlock,
    keeps_rows: bool = False,
    in_order: InOrder = one_by_one,
    kind: str = "cpu",
) -> PackedWeight:
    """Return a stack of parts of matrices that have the same format and the same columns. CheckpointError.

    ``keeps_rows``: outputs share no scales, since their order is changed later. ``kind``: of the device.
    """
    form, columns, elements = pieces[0].parts.form, pieces[0].columns, CHUNK_ELEMENTS[kind]
    if pieces[0].parts.packing == "gguf":
        return _read_blocks(pieces, read, in_order, elements)
    groups, order = _groups(pieces, read)
    edges = [edge for piece in pieces for edge in (piece.rows.start, len(piece.rows))]
    sharing = 1 if keeps_rows else math.gcd(form.rows, *edges)
    outputs = sum(len(piece.rows) for piece in pieces)

    def unpack(piece: Piece, rows: range) -> PackedWeight:
        return _packed(unpack_rows(piece.parts, read, rows, columns, groups), form, len(columns), sharing)

    calls = [partial(unpack, piece, rows) for piece in pieces for rows in _chunks(piece, sharing, elements)]
    stack = _stacked(in_order(calls), outputs)
    ends = itertools.accumulate(len(piece.rows) for piece in pieces)
    if order is None:
        return stack
    return PackedWeight(
        stack.kind, stack.words, stack.scales, stack.k, stack.group, sharing, stack.zeros, order, tuple(ends)
    )


def _read_blocks(pieces: Sequence[Piece], read: ReadBlock, in_order: InOrder, elements: int) -> PackedWeight:
    """Return a stack of parts of matrices of a GGUF file. Their columns are whole blocks."""
    columns = pieces[0].columns, *pieces[0].more_columns
    chunks = [(piece, rows) for piece in pieces for rows in _chunks(piece, 1, elements)]
    calls = [partial(unpack_blocks, piece.parts, read, rows, columns) for piece, rows in chunks]
    flags: list[Tensor] = []

    def weights() -> Iterator[PackedWeight]:
        for weight, is_bad in in_order(calls):
            flags.append(is_bad)
            yield weight

    stack = _stacked(weights(), sum(len(piece.rows) for piece in pieces))
    check_finite([piece.parts.values for piece, _ in chunks], flags)
    return stack


def _stacked(chunks: Iterable[PackedWeight], outputs: int) -> PackedWeight:
    """Return chunks of so many outputs in all as one weight."""
    stack: PackedWeight | None = None
    first = 0
    for chunk in chunks:
        stack = stack or _empty(chunk, outputs)
        _put(stack, first, chunk)
        first += len(chunk.words)
    assert stack is not None, "a matrix has rows"
    return stack


def _groups(pieces: Sequence[Piece], read: ReadBlock) -> tuple[range, Tensor | None]:
    """Return the groups that are needed, and each input's among them where the inputs are not in whole groups."""
    form, columns = pieces[0].parts.form, pieces[0].columns
    orders = [read_order(piece.parts, read, columns) for piece in pieces]
    if form.group == 0:
        return range(1), None
    if form.is_ordered:
        stored = pieces[0].parts.scales.shape
        return range(stored[0 if pieces[0].parts.packing == "gptq" else -1]), torch.stack(
            [order for order in orders if order is not None]
        )
    groups = range(columns.start // form.group, -(-columns.stop // form.group))
    if columns.start % form.group == 0:
        return groups, None
    inputs = torch.arange(columns.start, columns.stop, dtype=torch.int32)
    return groups, (inputs // form.group - groups.start).expand(len(pieces), -1)


def _chunks(piece: Piece, sharing: int, elements: int) -> list[range]:
    size = -(-max(1, elements // max(1, len(piece.columns))) // sharing) * sharing
    rows = piece.rows
    return [range(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size)]


def _packed(chunk: Unpacked, form: WeightFormat, k: int, sharing: int) -> PackedWeight:
    values = chunk.values if chunk.values.dtype != torch.float8_e4m3fn else chunk.values.view(torch.uint8)
    if form.quant in ("4", "fp4"):
        words = nibble_words(values + 8 if form.quant == "4" else values)
    else:
        words = octet_words(values)
    scales = chunk.scales[::sharing]
    if form.scale_bytes == 4:
        scales = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    zeros = chunk.zeros
    if zeros is not None and form.zero_bytes == 1:
        zeros = zeros.to(torch.int8)
    return PackedWeight(KIND_OF[form.quant], words, scales, k, form.group, sharing, zeros)


def _empty(chunk: PackedWeight, outputs: int) -> PackedWeight:
    """Return memory for as many outputs in the format of a chunk."""

    def rows(tensor: Tensor) -> Tensor:
        count = outputs // chunk.rows if tensor is chunk.scales else outputs
        return tensor.new_empty((count, *tensor.shape[1:]))

    return chunk.changed(rows)


def _put(stack: PackedWeight, first: int, chunk: PackedWeight) -> None:
    """Copy a chunk's outputs to the place from ``first`` on."""
    place = stack.outputs(first, first + len(chunk.words))
    for whole, part in zip(place.tensors(), chunk.tensors(), strict=True):
        whole.copy_(part)
