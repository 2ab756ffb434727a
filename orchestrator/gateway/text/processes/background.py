"""Work that would block the gateway's loop, in a few threads: loading the tokenizer, tokenizing long prompts."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

NUM_THREADS = 2


class BackgroundTasks:
    """A thread pool whose results wake a poller: ``fd`` is readable when `deliver_results` has something to do."""

    def __init__(self) -> None:
        self.fd, self.wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        """Anything written to ``wake_fd`` makes ``fd`` readable (signal.set_wakeup_fd writes there)."""
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="gateway-task")
        self._start_threads()
        self._finished: deque[tuple[Callable[[Future[Any]], None], Future[Any]]] = deque()

    def _start_threads(self) -> None:
        """Start all threads now: later the limit of processes may be reached. RuntimeError if it is."""
        all_run = threading.Barrier(NUM_THREADS)
        try:
            for _ in range(NUM_THREADS):
                self._pool.submit(all_run.wait)  # keeps its thread busy, so that the next task gets another
        except RuntimeError:
            all_run.abort()
            raise

    def run(self, work: Callable[[], object], then: Callable[[Future[Any]], None]) -> None:
        """Run ``work`` in a thread; `deliver_results` calls ``then`` with its future in the loop's own thread."""

        def on_done(future: Future[Any]) -> None:
            self._finished.append((then, future))
            with contextlib.suppress(BlockingIOError):  # a full pipe is readable, which is all that is needed
                os.write(self.wake_fd, b"\0")

        self._pool.submit(work).add_done_callback(on_done)

    def deliver_results(self) -> None:
        """Call ``then`` for everything that has finished."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        while self._finished:
            then, future = self._finished.popleft()
            then(future)

    def close(self) -> None:
        """Drop waiting work; a running task ends with the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)
