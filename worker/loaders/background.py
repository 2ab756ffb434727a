"""Threads that read packed matrices of a GPU: while one waits for a file or for the GPU, the others go on."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from mgpu.protocol.checkpoint.read import CheckpointError

MOST_THREADS = 4
"""Each holds a chunk of weights, and most of their work is Python's."""
RESULT_TIMEOUT_S = 600.0
"""Longest wait for one result: a disk that is silent for so long will not answer."""

T = TypeVar("T")


class Background:
    """Up to `MOST_THREADS` threads; with one, functions are called in the caller's."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._threads = max(1, min(MOST_THREADS, threads))
        self._inside = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        if self._threads > 1:
            self._pool = ThreadPoolExecutor(self._threads, "read-packed", partial(self._begin, device))

    def _begin(self, device: torch.device) -> None:
        self._inside.value = True
        if device.type == "cuda":
            torch.cuda.set_device(device)

    @property
    def is_inside(self) -> bool:
        """True in one of the threads, which must not wait for another."""
        return getattr(self._inside, "value", False)

    def in_order(self, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Call functions, some of them ahead, and return their results in order. CheckpointError."""
        if self._pool is None:
            yield from (call() for call in calls)
            return
        pending: deque[Future[T]] = deque()
        for call in calls:
            pending.append(self._pool.submit(_without_gradients, call))
            if len(pending) > self._threads:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())

    def close(self) -> None:
        """End the threads; calls that have not begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@torch.inference_mode()  # threads do not inherit it
def _without_gradients(call: Callable[[], T]) -> T:
    return call()


def _result(future: Future[T]) -> T:
    try:
        return future.result(RESULT_TIMEOUT_S)
    except TimeoutError as error:
        raise CheckpointError(f"the model's files gave no data for {RESULT_TIMEOUT_S:g} s") from error
