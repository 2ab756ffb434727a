"""Read one rank's slices of a checkpoint, whatever the file format.

Both formats store a matrix row by row in blocks of elements: one element for plain types, 32 or 256 for GGUF's
quantized ones. So a range of rows is one contiguous read, and a range of columns is one short read per row of the
blocks that cover it. ``pread`` rather than ``mmap``: a file that shrinks is a clear error, not a SIGBUS.
"""

import os
from collections.abc import Callable
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, TensorEntry
from mgpu.worker.loaders.block_formats import BlockType, block_type
from mgpu.worker.loaders.copiers import Progress, make_copier
from mgpu.worker.loaders.slices import FileRows, Slice

_CPU = torch.device("cpu")


class WeightReader:
    """Fills tensors from a checkpoint and counts the bytes it read. Use as a context manager; it owns its files.

    Those of a GPU are filled behind the caller's back, by ``threads`` threads: they may be used after `wait`, or once
    the context is left without an error. What ``progress`` is told, it is told in the caller's thread.
    """

    def __init__(
        self, checkpoint: Checkpoint, progress: Progress, device: torch.device = _CPU, threads: int = 1
    ) -> None:
        facts = checkpoint.facts
        is_gguf = checkpoint.source.format == "gguf"
        self.norms_include_one = is_gguf and facts.architecture == "gemma3"
        """True where the file's Gemma norm weights already have the 1 added that the model adds."""
        # llama.cpp stores the q and k rows of llama-family models with the two rotary halves of a head interleaved.
        self._interleaved_head_dim = facts.head_dim if is_gguf and facts.architecture in ("llama", "mistral") else 0
        self._tensors = checkpoint.tensors
        self._progress = progress
        self._files: dict[str, int] = {}
        self.bytes_read = 0
        self._copier = make_copier(device, threads, self._count)

    def _count(self, nbytes: int) -> None:
        self.bytes_read += nbytes
        self._progress(nbytes)

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._copier.check()
        finally:
            self._copier.close()
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()

    def wait(self) -> None:
        """Make the tensors that were filled so far usable. CheckpointError if one of them cannot be read."""
        self._copier.wait()

    def after(self, action: Callable[[], object]) -> None:
        """Call ``action``, which changes tensors in place, once those that were filled so far are usable."""
        self._copier.after(action)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def fill_rows(self, dest: Tensor, name: str, start: int = 0) -> None:
        """Copy rows ``[start, start + len(dest))`` of a tensor into ``dest``, converting to its dtype.

        A vector counts as a column of single values. CheckpointError when the tensor is absent, has another shape or
        does not hold finite numbers, or when its file is too short.
        """
        entry = self._entry(name)
        width = entry.shape[1] if len(entry.shape) == 2 else 1
        if dest.shape[1:] != entry.shape[1:] or not 0 <= start <= entry.shape[0] - len(dest):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(entry.shape)}; rows {start} to {start + len(dest)} of width "
                f"{list(dest.shape[1:])} were expected"
            )
        blocks = self._block_type(entry)
        # A vector of a plain type is read as one row, so that its elements stay contiguous.
        if len(entry.shape) == 1:
            self._fill(dest.unsqueeze(0), entry, blocks, first_row=0, first_column=start, row_width=entry.shape[0])
        else:
            self._fill(dest, entry, blocks, first_row=start, first_column=0, row_width=width)
        if self._interleaved_head_dim and ("q_proj." in name or "k_proj." in name):
            self.after(partial(_deinterleave, dest, self._interleaved_head_dim))

    def fill_columns(self, dest: Tensor, name: str, start: int = 0) -> None:
        """Copy columns ``[start, start + dest.shape[1])`` of a matrix into ``dest``. Errors as in `fill_rows`."""
        entry = self._entry(name)
        if len(entry.shape) != 2 or entry.shape[0] != dest.shape[0] or not 0 <= start <= entry.shape[1] - dest.shape[1]:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(entry.shape)}; columns {start} to {start + dest.shape[1]} of "
                f"{dest.shape[0]} rows were expected"
            )
        self._fill(dest, entry, self._block_type(entry), first_row=0, first_column=start, row_width=entry.shape[1])

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._tensors:
            raise CheckpointError(f"tensor {name!r} is missing from the checkpoint")
        return self._tensors[name]

    def _block_type(self, entry: TensorEntry) -> BlockType:
        try:
            return block_type(entry.dtype)
        except KeyError as error:
            raise CheckpointError(f"tensor {entry.name!r} has type {entry.dtype}, which mgpu cannot read") from error

    def _fill(
        self, dest: Tensor, entry: TensorEntry, blocks: BlockType, first_row: int, first_column: int, row_width: int
    ) -> None:
        """Fill ``dest`` [rows, columns] from the covering blocks, a piece of rows at a time."""
        rows, columns = dest.shape
        first_block = first_column // blocks.elements
        end_block = -(-(first_column + columns) // blocks.elements)
        row_bytes = row_width // blocks.elements * blocks.bytes
        read_bytes = (end_block - first_block) * blocks.bytes
        offset = entry.offset + first_row * row_bytes + first_block * blocks.bytes
        skip = first_column - first_block * blocks.elements
        decoded_bytes = 0 if blocks.dtype else 4 * columns
        slice_rows = max(1, self._copier.slice_bytes // max(1, read_bytes, decoded_bytes))
        fd = self._file(entry)
        for top in range(0, rows, slice_rows):
            count = min(slice_rows, rows - top)
            span = FileRows(entry, fd, offset + top * row_bytes, count, read_bytes, row_bytes)
            self._copier.fill(Slice(span, blocks, skip, dest[top : top + count]))

    def _file(self, entry: TensorEntry) -> int:
        path = str(entry.file)
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"cannot open {path} for tensor {entry.name!r}: {error.strerror}") from error
        return self._files[path]


def _deinterleave(rows: Tensor, head_dim: int) -> None:
    """Undo llama.cpp's rotary order in place: rows 0, 2, 4, … of each head become its first half."""
    heads = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    rows.copy_(heads.transpose(1, 2).reshape(rows.shape))
