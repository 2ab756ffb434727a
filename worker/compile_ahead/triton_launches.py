"""Compile kernels in threads before they are needed.

A kernel that is not in Triton's cache costs a compilation, then a C compiler's run for the code that launches it, twice
as long: ten seconds for the kernels of a model, one after the other. Threads do both at once, since neither holds
Python's lock for long.
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
import triton
from triton.runtime import _async_compile
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mgpu.worker.kernels.runtime import ASKING

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""Longest wait for the threads at the end; what they have not done by then is compiled when it is launched."""
_MOST_THREADS = 16
_starting = Lock()

T = TypeVar("T")


def start_driver() -> None:
    """Do what Triton needs once per process; later callers wait for the first.

    That is to compile the part that talks to CUDA, at a first start, and to hash the whole compiler, at every start.
    """
    if not _starting.acquire(timeout=TIMEOUT_S):
        return  # who launches first will see what is wrong
    try:
        triton_key()
        _ = driver.active.utils
    finally:
        _starting.release()


@dataclass(slots=True)
class Outcome:
    is_complete: bool = False
    """Whether every kernel that was asked for is there."""


@contextmanager
def compiling(device: torch.device, ranks_here: int) -> Iterator[Outcome]:
    """Compile in threads what is launched within, or asked for by `asking`; at the end all of it is there.

    Give each of ``ranks_here`` ranks of this machine its share of the cores.
    """
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // ranks_here))
    pool = ThreadPoolExecutor(threads, "compile", lambda: torch.cuda.set_device(device))
    mode = _async_compile.AsyncCompileMode(_Loading(pool), ignore_errors=True)
    outcome = Outcome()
    _async_compile.active_mode.set(mode)
    try:
        yield outcome
        outcome.is_complete = _finish(mode)
    finally:
        _async_compile.active_mode.set(None)
        pool.shutdown(wait=False, cancel_futures=True)


def _finish(mode: Any) -> bool:
    """Hand over the kernels; one that failed is compiled again where it is launched, and its error shows there."""
    done, late = wait(mode.raw_futures, TIMEOUT_S)
    for kernel in mode.future_kernels.values():
        if kernel.future in done:
            kernel.result(ignore_errors=True)
    failed = sum(future.exception() is not None for future in done)
    if failed or late:
        log.warning("%d kernels could not be compiled ahead, %d took more than %g s", failed, len(late), TIMEOUT_S)
    return not failed and not late


class _Loading(Executor):
    """Has kernels not only compiled but ready to launch: with their launcher, and loaded into the device."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    def submit(self, compile_kernel: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return self._inner.submit(_loaded, compile_kernel, *args, **kwargs)


def _loaded(compile_kernel: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    kernel: Any = compile_kernel(*args, **kwargs)
    kernel._init_handles()
    loaded: T = kernel
    return loaded


@contextmanager
def asking() -> Iterator[None]:
    """Have launches only ask for their kernels, none of which runs: what they should have written is undefined."""
    run = JITFunction.run

    def ask(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = ask
    ASKING.is_on = True
    try:
        yield
    finally:
        ASKING.is_on = False
        JITFunction.run = run


def cache_folder() -> Path:
    """Give the folder that Triton keeps compiled kernels in."""
    return Path(triton.knobs.cache.dir)
