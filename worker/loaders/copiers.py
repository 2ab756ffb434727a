"""Copy slices of tensors from files to the device that uses them.

For the CPU, slices are read straight into their place; those that must be converted go through one buffer. For a GPU,
threads read into pinned buffers. Each buffer has a stream of its own that copies and converts what was read, while the
thread reads into its other buffer. A read is one system call for megabytes, so threads rarely hold Python's lock.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.worker.loaders.slices import FileRows, Slice, total

DIRECT_BYTES = 4 << 20
"""File bytes read and decoded at once on the CPU. With fewer, torch's threads would wait for each other too often."""
STAGING_BYTES = 8 << 20
"""File bytes, and decoded numbers of quantized types, of one pinned buffer."""
BUFFERS_PER_THREAD = 2
"""A thread reads into one buffer while the other is copied to the GPU."""
MOST_THREADS = 8
"""Fewer already copy from the page cache at the speed of memory or of the bus. So at most 128 MiB are pinned."""
SLICE_TIMEOUT_S = 600.0
"""Longest wait for one slice: a disk that is silent for so long will not answer."""
_SUMS = 1024
"""Sums that are allocated together."""

Progress = Callable[[int], None]
Action = Callable[[], object]


def make_copier(device: torch.device, threads: int, progress: Progress) -> "DirectCopier | ThreadedCopier":
    """Return the copier for tensors of a device; ``threads`` are used for those of a GPU."""
    if device.type == "cpu":
        return DirectCopier(progress)
    return ThreadedCopier(device, max(1, threads), progress)


def reading_threads(ranks_here: int) -> int:
    """Return how many threads each of ``ranks_here`` ranks of this machine may read with."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // ranks_here))


class DirectCopier:
    """Copies to the CPU in the calling thread, so that every slice is in place at once; torch's own threads convert.

    Methods as in `ThreadedCopier`.
    """

    def __init__(self, progress: Progress) -> None:
        self.most_bytes = DIRECT_BYTES
        self._progress = progress
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, part: Slice) -> None:
        source = part.source
        if part.is_copy:
            source.read(part.dest.view(-1).view(torch.uint8).numpy().data)
        else:
            if len(self._buffer) < source.nbytes:
                self._buffer = torch.empty(source.nbytes, dtype=torch.uint8)
            raw = self._buffer[: source.nbytes]
            source.read(raw.numpy().data)
            part.dest.copy_(part.decode(raw))
        if not torch.isfinite(total(part.dest)):
            raise source.not_finite(part.dest.dtype)
        self._progress(source.nbytes)

    def after(self, action: Action) -> None:
        action()

    def wait(self) -> None:
        """Do nothing: every slice is in place, and was checked."""

    check = close = wait


class ThreadedCopier:
    """Copies to a GPU with several threads at once, in the background."""

    def __init__(self, device: torch.device, threads: int, progress: Progress) -> None:
        device = torch.empty(0, device=device).device  # with its index: each thread has a current device of its own
        self.most_bytes = STAGING_BYTES
        """Most bytes of one slice."""
        self._device = device
        self._progress = progress
        self._most_pending = 4 * threads
        self._buffers = [StagingBuffer(device) for _ in range(BUFFERS_PER_THREAD * threads)]
        self._free: SimpleQueue[StagingBuffer] = SimpleQueue()
        for buffer in self._buffers:
            self._free.put(buffer)
        self._pool = ThreadPoolExecutor(threads, "read-weights", partial(_use, device))
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._actions: list[Action] = []
        self._sums = _Sums(device)

    def copy(self, part: Slice) -> None:
        """Start copying a slice. CheckpointError, which may be about an earlier one."""
        if len(self._pending) >= self._most_pending:
            self._await_oldest()
        sum_out = self._sums.new(part)
        ready = _record(self._device)  # until then work on this stream may still use the memory of dest
        self._pending.append((self._pool.submit(self._move, part, sum_out, ready), part.source.nbytes))

    @torch.inference_mode()  # threads do not inherit it
    def _move(self, part: Slice, sum_out: Tensor, ready: torch.cuda.Event | None) -> None:
        buffer = self._free.get_nowait()  # there are more buffers than threads; the one freed longest ago comes first
        try:
            buffer.move(part, sum_out, ready)
        finally:
            self._free.put(buffer)

    def _await_oldest(self) -> None:
        future, nbytes = self._pending.popleft()
        try:
            future.result(SLICE_TIMEOUT_S)
        except TimeoutError as error:
            raise CheckpointError(f"the model's files gave no data for {SLICE_TIMEOUT_S:g} s") from error
        self._progress(nbytes)

    def after(self, action: Action) -> None:
        """Call ``action`` in `wait`, once all slices so far are in place."""
        self._actions.append(action)

    def wait(self) -> None:
        """Make all slices so far usable by what the caller does next on its stream. CheckpointError."""
        while self._pending:
            self._await_oldest()
        for buffer in self._buffers:
            buffer.join()
        actions, self._actions = self._actions, []
        for action in actions:
            action()

    def check(self) -> None:
        """Wait, then refuse numbers that are not finite. CheckpointError."""
        self.wait()
        self._sums.check()

    def close(self) -> None:
        """End the threads; slices that they have not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)


class StagingBuffer:
    """A pinned buffer and the stream that empties it, for one thread at a time. In tests on a CPU: plain memory."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._device = device
        self._buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._emptied: torch.cuda.Event | None = None

    def move(self, part: Slice, sum_out: Tensor, ready: torch.cuda.Event | None) -> None:
        """Read a slice and start its copy to ``dest``, not before ``ready``; ``sum_out`` gets its sum."""
        if self._emptied is not None:
            self._emptied.synchronize()
        source = part.source
        if len(self._buffer) < source.nbytes:  # a row longer than any buffer
            self._buffer = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=self._buffer.is_pinned())
        raw = self._buffer[: source.nbytes]
        source.read(raw.numpy().data)
        with torch.cuda.stream(self._stream):  # does nothing without a stream
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            self._send(part, raw)
            sum_out.copy_(total(part.dest))
            self._emptied = _record(self._device)

    def _send(self, part: Slice, raw: Tensor) -> None:
        if part.is_copy:
            part.dest.copy_(raw.view(part.dest.dtype).view(part.dest.shape), non_blocking=True)
            return
        # Converted on the GPU: a direct copy to another dtype and device would convert before it, on the CPU.
        values = part.decode(raw)
        part.dest.copy_(values.to(self._device, non_blocking=values.is_pinned()))

    def join(self) -> None:
        """Let the caller's stream wait for this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _use(device: torch.device) -> None:
    """Make ``device`` a new thread's current one; otherwise the thread would start a context on the first GPU too."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _record(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that happens once the current stream has done what it was given so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class _Sums:
    """One sum per slice, on the device, read back together at the end. Holds none of the tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: list[Tensor] = []
        self._sources: list[tuple[FileRows, torch.dtype]] = []

    def new(self, part: Slice) -> Tensor:
        """Return the place for a slice's sum, a scalar tensor of 0."""
        index = len(self._sources) % _SUMS
        if index == 0:
            self._sums.append(torch.zeros(_SUMS, dtype=torch.float32, device=self._device))
        self._sources.append((part.source, part.dest.dtype))
        return self._sums[-1][index]

    def check(self) -> None:
        """Raise CheckpointError for the first slice whose sum is not finite."""
        if not self._sums:
            return
        finite = torch.isfinite(torch.cat(self._sums)).cpu()
        if not finite.all():
            source, dtype = self._sources[int((~finite).nonzero()[0])]
            raise source.not_finite(dtype)
