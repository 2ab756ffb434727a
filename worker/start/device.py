"""The device that a spec names, and an early start of CUDA on it.

Starting CUDA and importing torch take about a second each. The driver does its part without Python's lock, so both run
side by side: `start_cuda` calls the driver through ctypes while torch is not imported yet, and torch later finds the
context that it made. This module must therefore not import torch itself.
"""

import ctypes
import logging
import os
from threading import Thread

log = logging.getLogger(__name__)

_DRIVER = "libcuda.so.1"


def cuda_ordinal(device: str) -> int:
    """Return the number of a CUDA device among the visible ones: N for ``cuda:N``, LOCAL_RANK for ``cuda``."""
    _, _, number = device.partition(":")
    return int(number or os.environ.get("LOCAL_RANK", "0"))


def prepare_cuda(device: str) -> None:
    """Start the driver in a process that waits for its spec, but open no GPU, which would take memory of it.

    Does nothing for a CPU. A failure is only logged, as in `start_cuda`.
    """
    if not device.startswith("cuda"):
        return
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    if (driver := _open_driver()) is not None and (code := driver.cuInit(0)):
        log.info("CUDA did not start early: cuInit returned %d", code)


def start_cuda(device: str) -> Thread | None:
    """Initialize CUDA in a thread on the device that a `WorkerSpec` names; return None for a CPU.

    A failure is only logged: torch meets it again and explains it better.
    """
    if not device.startswith("cuda"):
        return None
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # the driver reads it now; torch sets the same value too late
    thread = Thread(target=_retain_context, args=(cuda_ordinal(device),), name="start-cuda", daemon=True)
    thread.start()
    return thread


def _retain_context(ordinal: int) -> None:
    """Make the device's primary context, which lives as long as the process."""
    if (driver := _open_driver()) is None:
        return
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    for call, arguments in (
        (driver.cuInit, (0,)),
        (driver.cuDeviceGet, (ctypes.byref(handle), ordinal)),
        (driver.cuDevicePrimaryCtxRetain, (ctypes.byref(context), handle)),
    ):
        if code := call(*arguments):
            log.info("CUDA did not start early: %s returned %d", call.__name__, code)
            return


def _open_driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError as error:
        log.info("%s cannot be opened: %s", _DRIVER, error)
        return None
