"""Pieces of tensors: where their bytes are in a file, how they are read, and what is said when they are no numbers."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.read import CheckpointError, TensorEntry
from mgpu.worker.loaders.block_formats import BlockType

MOST_VIEWS = 1024
"""Buffers that the kernel takes in one call (IOV_MAX)."""
WIDEST_GAP = 16
"""Rows that are this many times longer than what is wanted of them are read one by one, others with their gaps."""


@dataclass(frozen=True, slots=True)
class FileRows:
    """``row_bytes`` bytes of each of ``rows`` rows that are ``stride`` bytes apart in a file."""

    entry: TensorEntry
    fd: int
    offset: int
    rows: int
    row_bytes: int
    stride: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def read(self, buffer: memoryview) -> None:
        """Fill ``buffer``, of `nbytes`. CheckpointError when the file is too short or cannot be read.

        What lies between the rows is read as well, into memory that is not looked at: one call of the kernel for
        hundreds of rows holds up no other thread, while one call for each of them would.
        """
        if self.stride == self.row_bytes:
            self._read_all([buffer], self.offset)
        elif self.stride > WIDEST_GAP * self.row_bytes:
            for row in range(self.rows):
                self._read_all([self._row(buffer, row)], self.offset + row * self.stride)
        else:
            gap = memoryview(bytearray(self.stride - self.row_bytes))
            for top in range(0, self.rows, MOST_VIEWS // 2):
                rows = range(top, min(top + MOST_VIEWS // 2, self.rows))
                views = [view for row in rows for view in (self._row(buffer, row), gap)]
                self._read_all(views[:-1], self.offset + top * self.stride)

    def _row(self, buffer: memoryview, row: int) -> memoryview:
        return buffer[row * self.row_bytes : (row + 1) * self.row_bytes]

    def _read_all(self, views: list[memoryview], offset: int) -> None:
        """Fill the views in order; the kernel may give less than was asked for at any time."""
        while views:
            try:
                count = os.preadv(self.fd, views, offset)
            except OSError as error:
                raise CheckpointError(f"cannot read tensor {self.entry.name!r}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.entry.file} ends inside tensor {self.entry.name!r}: the file is truncated"
                )
            offset += count
            views = _after(views, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """Give what is left of the views once ``count`` bytes are filled."""
    for done, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[done + 1 :]]
        count -= len(view)
    return []


@dataclass(frozen=True, slots=True)
class Slice:
    """Some rows of a tensor's slice: ``dest`` [rows, columns] gets the numbers of a span, converted to its dtype."""

    span: FileRows
    blocks: BlockType
    skip: int
    """Numbers of the first block of a row that come before the slice."""
    dest: Tensor

    @property
    def is_copy(self) -> bool:
        """Whether the file has the very bytes that ``dest`` takes."""
        return self.blocks.dtype == self.dest.dtype and self.dest.is_contiguous()

    def decode(self, raw: Tensor) -> Tensor:
        """Give the numbers, [rows, columns], of the span's bytes."""
        return decode(self.span, self.blocks, raw)[:, self.skip : self.skip + self.dest.shape[1]]


def decode(span: FileRows, blocks: BlockType, raw: Tensor) -> Tensor:
    """Give all numbers of a span's bytes, uint8 [nbytes]."""
    return blocks.decode(raw.view(span.rows, span.row_bytes))


def total(values: Tensor) -> Tensor:
    """Give a sum that is not finite if any value is not, without a temporary as large as they are."""
    return values.sum(dtype=torch.float32)


def not_finite(span: FileRows, blocks: BlockType, dtype: torch.dtype) -> CheckpointError:
    """Say why a span whose numbers have no finite sum in ``dtype`` is refused; reads it again to find out."""
    raw = torch.empty(span.nbytes, dtype=torch.uint8)
    span.read(raw.numpy().data)
    entry = span.entry
    if torch.isfinite(total(decode(span, blocks, raw))):
        return CheckpointError(f"tensor {entry.name!r} in {entry.file} does not fit {dtype}; use bfloat16 or float32")
    return CheckpointError(f"tensor {entry.name!r} in {entry.file} holds NaN or infinity: the file is corrupt")
