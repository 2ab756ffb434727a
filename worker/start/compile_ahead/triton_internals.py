"""Compile kernels in threads before they are needed: the only module that uses private parts of Triton.

A kernel that is not in Triton's cache costs a compilation, and then a C compiler's run for the code that launches it,
which takes twice as long: ten seconds for the kernels of a model, one after the other. Threads do both side by side,
since neither holds Python's lock for long.

`NEEDED` lists the private parts. Triton 3.5 and 3.6 have them (3.6 is what the tests run with), 3.4 does not. With a
Triton that lacks one, `require` raises, and kernels are compiled at their first launch.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
import triton

from mgpu.worker.kernels.runtime import LAUNCH_MODE

log = logging.getLogger(__name__)

_MODE = "triton.runtime._async_compile:AsyncCompileMode"
_ACTIVE_MODE = "triton.runtime._async_compile:active_mode"
_KEY = "triton.runtime.cache:triton_key"
_DRIVER = "triton.runtime.driver:driver"
_JIT_FUNCTION = "triton.runtime.jit:JITFunction"
NEEDED = (
    _MODE, _ACTIVE_MODE, "triton.runtime._async_compile:FutureKernel.result", _KEY, _DRIVER, f"{_JIT_FUNCTION}.run",
    "triton.compiler:CompiledKernel._init_handles", "triton:knobs.cache.dir",
)  # fmt: skip
"""Module and attribute of each private part."""
_MODE_ATTRIBUTES = ("raw_futures", "future_kernels")

TIMEOUT_S = 60.0
"""Longest wait for the threads at the end. Kernels that are not ready by then are compiled at their first launch."""
_MOST_THREADS = 16
_driver_start = Lock()

T = TypeVar("T")


def _private(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return attrgetter(attribute)(importlib.import_module(module))


def _exists(name: str) -> bool:
    try:
        _private(name)
        return True
    except (ImportError, AttributeError):
        return False


def missing_names() -> list[str]:
    """Return the private parts that this Triton lacks."""
    missing = [name for name in NEEDED if not _exists(name)]
    if _MODE not in missing:
        mode = _private(_MODE)(None)
        missing += [f"{_MODE}.{name}" for name in _MODE_ATTRIBUTES if not hasattr(mode, name)]
    return missing


def require() -> None:
    """Raise ImportError if this Triton lacks a private part."""
    if missing := missing_names():
        raise ImportError(f"triton {triton.__version__} has no {', '.join(missing)}")


def start_driver() -> None:
    """Do what Triton needs once per process; concurrent callers wait for the first.

    At a first start this compiles the part that talks to CUDA; at every start it hashes the whole compiler.
    """
    if not _driver_start.acquire(timeout=TIMEOUT_S):
        return  # the first launch will meet the same fault and report it
    try:
        _private(_KEY)()
        _ = _private(_DRIVER).active.utils
    finally:
        _driver_start.release()


@dataclass(slots=True)
class Outcome:
    is_complete: bool = False
    """Whether every kernel that was launched is compiled."""


@contextmanager
def compiling(device: torch.device, ranks_here: int) -> Iterator[Outcome]:
    """Compile in threads the kernels that are launched in the body; at its end all of them are ready.

    ``ranks_here`` ranks of this machine share its cores.
    """
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // ranks_here))
    pool = ThreadPoolExecutor(threads, "compile", lambda: torch.cuda.set_device(device))
    mode, active_mode = _private(_MODE)(_LoadingExecutor(pool)), _private(_ACTIVE_MODE)
    outcome = Outcome()
    active_mode.set(mode)
    try:
        yield outcome
        outcome.is_complete = _finish(mode)
    finally:
        active_mode.set(None)
        pool.shutdown(wait=False, cancel_futures=True)


def _finish(mode: Any) -> bool:
    """Hand the kernels over to Triton. One that failed is compiled again at its launch, which reports its error."""
    done, late = wait(mode.raw_futures, TIMEOUT_S)
    failed = {future for future in done if future.exception() is not None}
    for kernel in mode.future_kernels.values():
        if kernel.future in done - failed:
            kernel.result()
    if failed or late:
        log.warning("%d kernels could not be compiled ahead, %d took more than %g s", len(failed), len(late), TIMEOUT_S)
    return not failed and not late


class _LoadingExecutor(Executor):
    """Make kernels not only compiled but ready to launch: with their launcher, and loaded into the device."""

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
def compile_only() -> Iterator[None]:
    """Make launches compile their kernels without running them; the tensors they would write stay undefined."""
    jit_function = _private(_JIT_FUNCTION)
    run = jit_function.run

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    jit_function.run = compile_kernel
    LAUNCH_MODE.compiles_only = True
    try:
        yield
    finally:
        LAUNCH_MODE.compiles_only = False
        jit_function.run = run


def cache_folder() -> Path:
    """Return the folder in which Triton keeps compiled kernels."""
    return Path(_private("triton:knobs.cache.dir"))
