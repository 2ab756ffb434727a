"""Slices of stored tensors: which bytes of a file they are, how those are read, and which numbers they become.

The example in reader.py shows the arithmetic with numbers.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mgpu.protocol.checkpoint.read import CheckpointError, TensorEntry
from mgpu.worker.loaders.block_formats import BlockType

WIDEST_GAP = 16
"""If a row is more than this many times as long as the wanted part of it, the parts are read one by one."""
READ_AT_ONCE = 1 << 20
"""Bytes of rows with gaps that are read together: they are still in the processor's cache when they are picked."""


@dataclass(frozen=True, slots=True)
class FileRows:
    """``row_bytes`` bytes (whole blocks) of each of ``rows`` rows, which begin ``stride`` bytes apart in a file."""

    entry: TensorEntry
    blocks: BlockType
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

        Short gaps between the rows are read too, and left out of the copy: one system call and one copy for hundreds
        of rows leave other threads alone, while a call or a view per row would take Python's lock each time.
        """
        if self.stride == self.row_bytes:
            self._read_all(buffer, self.offset)
        elif self.stride > WIDEST_GAP * self.row_bytes:
            for row in range(self.rows):
                self._read_all(buffer[row * self.row_bytes :][: self.row_bytes], self.offset + row * self.stride)
        else:
            self._read_with_gaps(np.frombuffer(buffer, np.uint8).reshape(self.rows, self.row_bytes))

    def _read_with_gaps(self, wanted: "np.typing.NDArray[np.uint8]") -> None:
        """Fill ``wanted``, uint8 [rows, row_bytes], some rows at a time; the last row's gap is not read."""
        most = min(self.rows, max(1, READ_AT_ONCE // self.stride))
        scratch = bytearray(most * self.stride)
        stored = np.frombuffer(scratch, np.uint8).reshape(most, self.stride)
        for top in range(0, self.rows, most):
            count = min(most, self.rows - top)
            nbytes = (count - 1) * self.stride + self.row_bytes
            self._read_all(memoryview(scratch)[:nbytes], self.offset + top * self.stride)
            wanted[top : top + count] = stored[:count, : self.row_bytes]

    def _read_all(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer. The kernel may return fewer bytes than were asked for at any time."""
        while buffer:
            try:
                count = os.preadv(self.fd, [buffer], offset)
            except OSError as error:
                raise CheckpointError(f"cannot read tensor {self.entry.name!r}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.entry.file} ends inside tensor {self.entry.name!r}: the file is truncated"
                )
            offset += count
            buffer = buffer[count:]

    def decode(self, raw: Tensor) -> Tensor:
        """Return all numbers, [rows, numbers], of the bytes that `read` got, uint8 [nbytes]."""
        return self.blocks.decode(raw.view(self.rows, self.row_bytes))

    def not_finite(self, dtype: torch.dtype) -> CheckpointError:
        """Return the error for numbers whose sum in ``dtype`` is not finite; reads them again to find out why."""
        raw = torch.empty(self.nbytes, dtype=torch.uint8)
        self.read(raw.numpy().data)
        where = f"tensor {self.entry.name!r} in {self.entry.file}"
        if torch.isfinite(total(self.decode(raw))):
            return CheckpointError(f"{where} does not fit {dtype}; use bfloat16 or float32")
        return CheckpointError(f"{where} holds NaN or infinity: the file is corrupt; download it again")


@dataclass(frozen=True, slots=True)
class Slice:
    """Numbers of some rows and columns of a stored tensor, and ``dest`` [rows, columns], which they are copied to."""

    source: FileRows
    skip: int
    """Numbers of a row's first block that come before the slice."""
    dest: Tensor

    @property
    def is_copy(self) -> bool:
        """True if the file holds the very bytes that ``dest`` takes."""
        return self.source.blocks.dtype == self.dest.dtype and self.dest.is_contiguous()

    def decode(self, raw: Tensor) -> Tensor:
        """Return the slice's numbers, [rows, columns], of the bytes that were read."""
        return self.source.decode(raw)[:, self.skip : self.skip + self.dest.shape[1]]

    def split(self, most_bytes: int) -> Iterator["Slice"]:
        """Cut into slices of so many rows that neither their bytes nor their decoded numbers exceed ``most_bytes``."""
        whole = self.source
        decoded_bytes = 0 if whole.blocks.dtype else 4 * self.dest.shape[1]
        most_rows = max(1, most_bytes // max(1, whole.row_bytes, decoded_bytes))
        for top in range(0, whole.rows, most_rows):
            count = min(most_rows, whole.rows - top)
            source = replace(whole, offset=whole.offset + top * whole.stride, rows=count)
            yield Slice(source, self.skip, self.dest[top : top + count])


def slice_of(
    entry: TensorEntry,
    blocks: BlockType,
    fd: int,
    dest: Tensor,
    first_row: int,
    first_column: int,
    row_width: int,
) -> Slice:
    """Return the slice that fills ``dest`` from ``first_row`` and ``first_column``; rows have ``row_width`` numbers."""
    rows, columns = dest.shape
    first_block = first_column // blocks.elements
    end_block = -(-(first_column + columns) // blocks.elements)
    stride = row_width // blocks.elements * blocks.bytes * entry.row_step
    offset = entry.offset + first_row * stride + first_block * blocks.bytes
    source = FileRows(entry, blocks, fd, offset, rows, (end_block - first_block) * blocks.bytes, stride)
    return Slice(source, first_column - first_block * blocks.elements, dest)


def total(values: Tensor) -> Tensor:
    """Return a sum that is not finite if any value is not; takes no temporary as large as the values."""
    return values.sum(dtype=torch.float32)
