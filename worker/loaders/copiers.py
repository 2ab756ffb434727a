"""Bring pieces of tensors from files to where they are used.

On the CPU one buffer serves all pieces that must be converted, others are read into their place. For a GPU threads read
into pinned buffers, each with a stream of its own that copies and converts; only bookkeeping holds Python's lock, since
a read takes one call for megabytes.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.worker.loaders.block_formats import BlockType
from mgpu.worker.loaders.slices import FileRows, Slice, not_finite, total

DIRECT_BYTES = 4 << 20
"""File bytes read and decoded at once on the CPU. Of less, torch's threads would wait for each other too often."""
STAGING_BYTES = 8 << 20
"""File bytes, and decoded numbers of quantized types, of one pinned buffer."""
BUFFERS_PER_THREAD = 2
"""A thread reads into one buffer while the other is copied to the GPU."""
MOST_THREADS = 8
"""Copies from the page cache reach the speed of memory or of the bus before that: 128 MiB of pinned buffers at most."""
SLICE_TIMEOUT_S = 600.0
"""Longest wait for one piece; a disk that gives nothing for so long is not going to."""
_SUMS = 1024
"""Sums that are allocated together."""

Progress = Callable[[int], None]
Action = Callable[[], object]


class Copier(Protocol):
    """Fills tensors, at once or behind the caller's back."""

    slice_bytes: int
    """Most bytes of one piece."""

    def fill(self, piece: Slice) -> None:
        """Take a piece on; an error of an earlier one may be raised here. CheckpointError."""
        ...

    def after(self, action: Action) -> None:
        """Call ``action`` once everything taken on so far is there, before `wait` returns."""
        ...

    def wait(self) -> None:
        """Make what was taken on usable by what the caller does next on its device. CheckpointError."""
        ...

    def check(self) -> None:
        """Settle, and refuse numbers that are not finite. CheckpointError."""
        ...

    def close(self) -> None: ...


def make_copier(device: torch.device, threads: int, progress: Progress) -> Copier:
    """Give the way to fill tensors of a device; ``threads`` are for those of a GPU."""
    if device.type == "cpu":
        return DirectCopier(progress)
    return ThreadedCopier(device, max(1, threads), progress)


def reading_threads(ranks_here: int) -> int:
    """Give the threads that one of ``ranks_here`` ranks of this machine may read with."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks_here))


class DirectCopier:
    """Fills tensors of the CPU in the calling thread; torch's own threads convert."""

    def __init__(self, progress: Progress) -> None:
        self.slice_bytes = DIRECT_BYTES
        self._progress = progress
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fill(self, piece: Slice) -> None:
        span = piece.span
        if piece.is_copy:
            span.read(piece.dest.view(-1).view(torch.uint8).numpy().data)
        else:
            raw = self._bytes(span.nbytes)
            span.read(raw.numpy().data)
            piece.dest.copy_(piece.decode(raw))
        if not torch.isfinite(total(piece.dest)):
            raise not_finite(span, piece.blocks, piece.dest.dtype)
        self._progress(span.nbytes)

    def _bytes(self, count: int) -> Tensor:
        if len(self._buffer) < count:
            self._buffer = torch.empty(count, dtype=torch.uint8)
        return self._buffer[:count]

    def after(self, action: Action) -> None:
        action()

    def wait(self) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class ThreadedCopier:
    """Fills tensors from several threads at once. A GPU's dest may be used on the caller's stream after `wait`."""

    def __init__(self, device: torch.device, threads: int, progress: Progress) -> None:
        device = torch.empty(0, device=device).device  # which one: threads have a current device of their own
        self.slice_bytes = STAGING_BYTES
        self._device = device
        self._progress = progress
        self._most_pending = 4 * threads
        self._lanes = [StagingBuffer(device) for _ in range(BUFFERS_PER_THREAD * threads)]
        self._free: SimpleQueue[StagingBuffer] = SimpleQueue()
        for lane in self._lanes:
            self._free.put(lane)
        self._pool = ThreadPoolExecutor(threads, "read-weights", partial(_use, device))
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._later: list[Action] = []
        self._sums = _Sums(device)

    def fill(self, piece: Slice) -> None:
        if len(self._pending) >= self._most_pending:
            self._await_oldest()
        slot = self._sums.slot(piece)
        ready = _record(self._device)  # the memory of dest may still be in use for what it was before
        self._pending.append((self._pool.submit(self._move, piece, slot, ready), piece.span.nbytes))

    @torch.inference_mode()  # threads do not inherit it
    def _move(self, piece: Slice, slot: Tensor, ready: torch.cuda.Event | None) -> None:
        lane = self._free.get_nowait()  # there are more of them than threads; the one used longest ago comes first
        try:
            lane.move(piece, slot, ready)
        finally:
            self._free.put(lane)

    def _await_oldest(self) -> None:
        future, nbytes = self._pending.popleft()
        try:
            future.result(SLICE_TIMEOUT_S)
        except TimeoutError as error:
            raise CheckpointError(f"the model's files gave no data for {SLICE_TIMEOUT_S:g} s") from error
        self._progress(nbytes)

    def after(self, action: Action) -> None:
        self._later.append(action)

    def wait(self) -> None:
        while self._pending:
            self._await_oldest()
        for lane in self._lanes:
            lane.join()
        later, self._later = self._later, []
        for action in later:
            action()

    def check(self) -> None:
        self.wait()
        self._sums.check()

    def close(self) -> None:
        """End the threads. What they still have to do is not done."""
        self._pool.shutdown(cancel_futures=True)


class StagingBuffer:
    """A pinned buffer and the stream that empties it; one thread at a time has it. On a CPU: memory alone."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._device = device
        self._buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._emptied: torch.cuda.Event | None = None

    def move(self, piece: Slice, slot: Tensor, ready: torch.cuda.Event | None) -> None:
        """Read a piece and start its way to ``dest``; ``slot`` gets the sum of its numbers."""
        if self._emptied is not None:
            self._emptied.synchronize()
        raw = self._bytes(piece.span.nbytes)
        piece.span.read(raw.numpy().data)
        with self._on_stream():
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            self._send(piece, raw)
            slot.copy_(total(piece.dest))
            self._emptied = _record(self._device)

    def _send(self, piece: Slice, raw: Tensor) -> None:
        if piece.is_copy:
            piece.dest.copy_(raw.view(piece.dest.dtype).view(piece.dest.shape), non_blocking=True)
            return
        # Convert behind the bus: a copy to another device would convert before it, on the CPU.
        values = piece.decode(raw)
        piece.dest.copy_(values.to(self._device, non_blocking=values.is_pinned()))

    def _bytes(self, count: int) -> Tensor:
        if len(self._buffer) < count:  # a row longer than any buffer
            self._buffer = torch.empty(count, dtype=torch.uint8, pin_memory=self._buffer.is_pinned())
        return self._buffer[:count]

    def _on_stream(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream)  # no stream: does nothing

    def join(self) -> None:
        """Let the caller's stream wait for this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _use(device: torch.device) -> None:
    """Have a new thread begin on its device: else it makes a context on the first one as well."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _record(device: torch.device) -> torch.cuda.Event | None:
    """Mark what the current stream has been given so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class _Sums:
    """One sum per piece, on the device, and what to say if it is not finite. Holds none of the tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []
        self._spans: list[tuple[FileRows, BlockType, torch.dtype]] = []

    def slot(self, piece: Slice) -> Tensor:
        index = len(self._spans) % _SUMS
        if index == 0:
            self._blocks.append(torch.zeros(_SUMS, dtype=torch.float32, device=self._device))
        self._spans.append((piece.span, piece.blocks, piece.dest.dtype))
        return self._blocks[-1][index]

    def check(self) -> None:
        if not self._blocks:
            return
        finite = torch.isfinite(torch.cat(self._blocks)).cpu()
        if not finite.all():
            raise not_finite(*self._spans[int((~finite).nonzero()[0])])
