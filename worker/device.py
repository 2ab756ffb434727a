"""Start CUDA while Python imports torch: both take long, and the driver's part holds no lock of Python's.

Called through the driver itself, since torch is not there yet. What it makes is the context that torch then finds.
"""

import ctypes
import logging
import os
from threading import Thread

log = logging.getLogger(__name__)

_DRIVER = "libcuda.so.1"


def start_cuda(device: str) -> Thread | None:
    """Initialize CUDA on a device, as a `WorkerSpec` names it, in a thread; None where there is nothing to do.

    A failure is only logged: torch meets it again, and says it better.
    """
    if not device.startswith("cuda"):
        return None
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # read now; torch sets the same, but later
    thread = Thread(target=_retain_context, args=(ordinal_of(device),), name="start-cuda", daemon=True)
    thread.start()
    return thread


def ordinal_of(device: str) -> int:
    """Give the number of a device among the visible ones: that of ``cuda:N``, or LOCAL_RANK for ``cuda``."""
    _, _, number = device.partition(":")
    return int(number or os.environ.get("LOCAL_RANK", "0"))


def _retain_context(ordinal: int) -> None:
    """Make the device's primary context, which lives as long as the process."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        log.info("%s cannot be opened: %s", _DRIVER, error)
        return
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    for call, arguments in (
        (driver.cuInit, (0,)),
        (driver.cuDeviceGet, (ctypes.byref(handle), ordinal)),
        (driver.cuDevicePrimaryCtxRetain, (ctypes.byref(context), handle)),
    ):
        if code := call(*arguments):
            log.info("CUDA did not start early: %s gives %d", call.__name__, code)
            return
