"""Read one rank's slices of a checkpoint, whatever the file format.

A rank needs rows of some matrices and columns of others. All formats store a matrix row by row, and a row as blocks: a
block holds one number in plain types, 32 or 256 in GGUF's quantized ones, and is decoded as a whole. So rows are one
contiguous range of bytes, and columns are the same short range of every row: the blocks that cover them.

Example: rank 1 of 3 takes columns 1365 to 2730 of a Q8_0 matrix of 4096 x 4096. A block is 32 numbers in 34 bytes, so a
row is 128 blocks in 4352 bytes. The columns lie in blocks 42 to 85: 44 blocks, or `row_bytes` = 1496 bytes of each row,
from byte 42 * 34 = 1428 on, `stride` = 4352 bytes apart. They decode to 1408 numbers; the first `skip` = 21 of them and
the last 22 belong to others. As float32, the rank's part of a row takes 5460 bytes, so 1536 rows fit into a buffer
of 8 MiB: the matrix is read as slices of 1536, 1536 and 1024 rows. A copier (copiers.py) moves each to the device.

Files are read by ``preadv``, not mapped: a file that shrinks is then a clear error and not a SIGBUS.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.gguf.families import INTERLEAVED
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, TensorEntry
from mgpu.protocol.model.facts import HYBRID
from mgpu.worker.loaders.background import Background
from mgpu.worker.loaders.block_formats import NUMBERS, BlockType, block_type
from mgpu.worker.loaders.copiers import Progress, make_copier
from mgpu.worker.loaders.packed import Piece, one_by_one, read_packed
from mgpu.worker.loaders.pinned_reads import PinnedReads
from mgpu.worker.loaders.slices import FileRows, slice_of, total
from mgpu.worker.quantization.packing import PackedWeight, dequantize

_CPU = torch.device("cpu")
T = TypeVar("T")


class WeightReader:
    """Fills tensors from a checkpoint and counts the bytes it read. Use as a context manager; it owns its files.

    ``threads`` threads fill tensors of a GPU in the background; they may be used after `wait`, or once the context is
    left without an error. ``progress`` is called in the caller's thread.
    """

    def __init__(
        self, checkpoint: Checkpoint, progress: Progress, device: torch.device = _CPU, threads: int = 1
    ) -> None:
        self._checkpoint = checkpoint
        self._for_cpu: WeightReader | None = None
        facts = checkpoint.facts
        is_gguf = checkpoint.source.format == "gguf"
        self.norms_include_one = is_gguf and facts.architecture in ("gemma2", "gemma3", *HYBRID)
        """True where the file's norm weights already have the 1 added that the model adds."""
        self.stores_rates = is_gguf
        """True where rates of fading are stored as they are used, below zero, and not as logarithms."""
        # llama.cpp stores the q and k rows of llama-family models with the two rotary halves of a head interleaved, and
        # so does Llama 4 anywhere.
        is_interleaved = facts.architecture in INTERLEAVED if is_gguf else facts.architecture == "llama4"
        self._interleaved_head_dim = facts.head_dim if is_interleaved else 0
        self._head_dim, self._rotated_size = facts.head_dim, facts.rotated_size
        self._tensors = checkpoint.tensors
        self._progress = progress
        self._files: dict[str, int] = {}
        self.bytes_read = 0
        self._unreported: deque[int] = deque()
        """Bytes of packed matrices: read in any thread, reported in the caller's."""
        self._device = device
        self._copier = make_copier(device, threads, self._count)
        self._background = Background(device, threads if device.type == "cuda" else 1)
        self._pinned = PinnedReads(device) if device.type == "cuda" else None
        self._opening = Lock()

    def for_cpu(self) -> "WeightReader":
        """Return the reader for tensors on the CPU: this one, or a second one beside that of a GPU, closed with it."""
        if self._device.type == "cpu":
            return self
        if self._for_cpu is None:
            self._for_cpu = WeightReader(self._checkpoint, self._count)
        return self._for_cpu

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
            self._background.close()
            if self._for_cpu is not None:
                self._for_cpu.__exit__(kind, error, trace)
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()

    def wait(self) -> None:
        """Wait until the tensors that were filled so far may be used. CheckpointError if one cannot be read."""
        self._copier.wait()

    def after(self, action: Callable[[], object]) -> None:
        """Call ``action``, which changes tensors in place, once those that were filled so far may be used."""
        self._copier.after(action)

    def fill_rows(self, dest: Tensor, name: str, start: int = 0) -> None:
        """Copy rows ``[start, start + len(dest))`` of a tensor into ``dest``, converting to its dtype.

        A vector counts as a column of single values. CheckpointError when the tensor is absent, has another shape or
        does not hold finite numbers, or when its file is too short.
        """
        entry = self._entry(name)
        if entry.joined:
            self._fill_joined(dest, entry, start)
            return
        self._fill_rows_of(dest, entry, start)
        if _has_heads(name):
            self._arrange_heads(dest)

    def _fill_joined(self, dest: Tensor, entry: TensorEntry, start: int) -> None:
        """Fill ``dest`` with the rows of the parts of a tensor that it covers."""
        first, end = 0, start + len(dest)
        for part in entry.joined:
            rows = range(max(start, first), min(end, first + part.shape[0]))
            if rows:
                self._fill_rows_of(dest[rows.start - start : rows.stop - start], part, rows.start - first)
            first += part.shape[0]
        if end > first:
            raise self._wrong_rows(dest, entry, start)

    def _fill_rows_of(self, dest: Tensor, entry: TensorEntry, start: int) -> None:
        if dest.shape[1:] != entry.shape[1:] or not 0 <= start <= entry.shape[0] - len(dest):
            raise self._wrong_rows(dest, entry, start)
        if len(entry.shape) == 1 and entry.row_step > 1:
            self._fill(dest.unsqueeze(1), entry, first_row=start, first_column=0, row_width=1)
        elif len(entry.shape) == 1:  # read as columns of one row, so that the elements stay contiguous
            self._fill(dest.unsqueeze(0), entry, first_row=0, first_column=start, row_width=entry.shape[0])
        else:
            self._fill(dest, entry, first_row=start, first_column=0, row_width=entry.shape[1])

    def _wrong_rows(self, dest: Tensor, entry: TensorEntry, start: int) -> CheckpointError:
        return CheckpointError(
            f"tensor {entry.name!r} has shape {list(entry.shape)}; rows {start} to {start + len(dest)} of width "
            f"{list(dest.shape[1:])} were expected"
        )

    def in_background(self, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Call functions that read packed matrices, several at once for a GPU; return their results in order."""
        for result in self._background.in_order(calls):
            self._report()
            yield result
        self._report()

    def _report(self) -> None:
        while self._unreported:
            self._count(self._unreported.popleft())

    def packed_rows(self, parts: Sequence[tuple[str, range]]) -> PackedWeight:
        """Return some rows of each of several matrices of the same packed format, stacked. CheckpointError."""
        pieces = [piece for name, rows in parts for piece in self._row_pieces(name, rows)]
        is_reordered = any(_has_heads(name) for name, _ in parts) and self._reorders_heads
        stack = self._read_packed(pieces, is_reordered)
        first = 0
        for name, rows in parts:
            if is_reordered and _has_heads(name):
                for tensor in stack.by_output():
                    self._arrange_heads(tensor[first : first + len(rows)])
            first += len(rows)
        return stack

    @property
    def _reorders_heads(self) -> bool:
        return self._rotated_size > 0 or self._interleaved_head_dim > 0

    def packed_columns(self, name: str, *columns: range) -> PackedWeight:
        """Return some columns of a packed matrix, side by side if they are several ranges. CheckpointError."""
        entry = self._entry(name)
        return self._read_packed([self._piece(entry, range(entry.shape[0]), columns)])

    def _read_packed(self, pieces: Sequence[Piece], keeps_rows: bool = False) -> PackedWeight:
        in_order = one_by_one if self._background.is_inside else self.in_background
        return read_packed(pieces, self._read_block, keeps_rows, in_order, self._device.type)

    def _row_pieces(self, name: str, rows: range) -> list[Piece]:
        """Return whole rows of a packed matrix: several pieces if they lie in several places."""
        entry = self._entry(name)
        if not entry.joined:
            return [self._piece(entry, rows, (range(entry.shape[1]),))]
        assert rows == range(entry.shape[0]), "tensors of several places are read whole"
        return [self._piece(part, range(part.shape[0]), (range(part.shape[1]),)) for part in entry.joined]

    def _piece(self, entry: TensorEntry, rows: range, columns: tuple[range, ...]) -> Piece:
        assert entry.packed is not None, "only packed matrices are asked for"
        if rows.stop > entry.shape[0] or columns[-1].stop > entry.shape[1]:
            raise CheckpointError(
                f"tensor {entry.name!r} has shape {list(entry.shape)}; rows to {rows.stop} and columns to "
                f"{columns[-1].stop} were expected"
            )
        return Piece(entry.packed, rows, columns[0], columns[1:])

    def _read_block(self, entry: TensorEntry, rows: range, columns: range) -> Tensor:
        """Read stored rows and columns of a part of a packed matrix, as they are. A vector counts as one row."""
        numbers = NUMBERS[entry.dtype]
        width = entry.shape[-1] if entry.shape else 1
        size, row_bytes = numbers.itemsize, len(columns) * numbers.itemsize
        offset = entry.offset + (rows.start * width + columns.start) * size
        plain = BlockType(1, size, lambda raw: raw.view(numbers), numbers)
        file = self._open(str(entry.file), entry)
        source = FileRows(entry, plain, file, offset, len(rows), row_bytes, width * size * rows.step)
        if self._pinned is not None:
            raw = self._pinned.read(source)
        else:
            raw = torch.empty(source.nbytes, dtype=torch.uint8)
            source.read(raw.numpy().data)
        self._unreported.append(source.nbytes)
        return raw.view(numbers).view(len(rows), len(columns)).to(self._device)

    def _fill_dequantized(self, dest: Tensor, entry: TensorEntry, first_row: int, first_column: int) -> None:
        """Fill ``dest`` with numbers of a packed matrix, some rows at a time."""
        assert entry.packed is not None
        columns = range(first_column, first_column + dest.shape[1])
        step = entry.packed.block_rows * math.ceil((1 << 21) / max(1, dest.shape[1]) / entry.packed.block_rows)
        for top in range(0, len(dest), step):
            part = dest[top : top + step]
            rows = range(first_row + top, first_row + top + len(part))
            part.copy_(dequantize(read_packed([Piece(entry.packed, rows, columns)], self._read_block), dest.dtype))
            if not torch.isfinite(total(part)):
                raise CheckpointError(f"tensor {entry.name!r} in {entry.file} does not fit {dest.dtype}")

    def _arrange_heads(self, rows: Tensor) -> None:
        """Bring rows of queries or keys into the order in which heads are rotated, once they are there."""
        if self._interleaved_head_dim:
            self.after(partial(_deinterleave, rows, self._interleaved_head_dim))
        if self._rotated_size:
            self.after(partial(_spread_rotated, rows, self._head_dim, self._rotated_size))

    def fill_columns(self, dest: Tensor, name: str, start: int = 0) -> None:
        """Copy columns ``[start, start + dest.shape[1])`` of a matrix into ``dest``. Errors as in `fill_rows`."""
        entry = self._entry(name)
        if len(entry.shape) != 2 or entry.shape[0] != dest.shape[0] or not 0 <= start <= entry.shape[1] - dest.shape[1]:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(entry.shape)}; columns {start} to {start + dest.shape[1]} of "
                f"{dest.shape[0]} rows were expected"
            )
        self._fill(dest, entry, first_row=0, first_column=start, row_width=entry.shape[1])

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._tensors:
            raise CheckpointError(f"tensor {name!r} is missing from the checkpoint")
        return self._tensors[name]

    def _fill(self, dest: Tensor, entry: TensorEntry, first_row: int, first_column: int, row_width: int) -> None:
        if entry.packed is not None and entry.packed.packing != "gguf":
            self._fill_dequantized(dest, entry, first_row, first_column)
            return
        if entry.is_transposed:
            self._fill_transposed(dest, entry, first_row, first_column)
            return
        try:
            blocks = block_type(entry.dtype)
        except KeyError as error:
            raise CheckpointError(f"tensor {entry.name!r} has type {entry.dtype}, which mgpu cannot read") from error
        file = self._open(str(entry.file), entry)
        whole = slice_of(entry, blocks, file, dest, first_row, first_column, row_width)
        for part in whole.split(self._copier.most_bytes):
            self._copier.copy(part)

    def _fill_transposed(self, dest: Tensor, entry: TensorEntry, first_row: int, first_column: int) -> None:
        """Read the columns of the file that are the rows of ``dest``, then turn them."""
        rows, columns = dest.shape
        step = entry.row_step
        stored = dest.new_empty((columns, (rows - 1) * step + 1))
        plain = replace(entry, is_transposed=False, row_step=1)
        self._fill(stored, plain, first_column, first_row * step, entry.stored_columns)
        self.wait()
        dest.copy_(stored[:, ::step].T)

    def _open(self, path: str, entry: TensorEntry) -> int:
        with self._opening:
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"cannot open {path} for tensor {entry.name!r}: {error.strerror}") from error
            return self._files[path]


def _has_heads(name: str) -> bool:
    """Return True for queries and keys, and their norms, whose rows are in the order in which heads are rotated."""
    return any(part in name for part in (".q_proj.", ".k_proj.", ".q_norm.", ".k_norm."))


def _deinterleave(rows: Tensor, head_dim: int) -> None:
    """Undo llama.cpp's rotary order in place: rows 0, 2, 4, … of each head become its first half."""
    heads = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    rows.copy_(heads.transpose(1, 2).reshape(rows.shape))


def _spread_rotated(rows: Tensor, head_dim: int, rotated: int) -> None:
    """Reorder the rows of each head so that its rotated components are the first of each half.

    A whole head is rotated in pairs (i, i + K / 2). Of a head of which only the first R components are, in pairs
    (i, i + R / 2), the two parts move to the beginnings of the halves, and the others follow with angles of zero.
    Queries and keys are reordered alike, so their products stay.
    """
    first, second, rest = range(rotated // 2), range(rotated // 2, rotated), range(rotated, head_dim)
    half = len(rest) // 2
    order = torch.tensor([*first, *rest[:half], *second, *rest[half:]], device=rows.device)
    heads = rows.view(-1, head_dim, *rows.shape[1:])
    rows.copy_(heads.index_select(1, order).reshape(rows.shape))
