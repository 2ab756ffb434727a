"""Wait for what no event announces."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from mgpu.protocol.errors import MgpuError

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout_s: float) -> T | None:
    """Return the first true value of ``condition``, or None after ``timeout_s``.

    An `MgpuError` counts as "not yet": a server that is being replaced does not answer.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        with suppress(MgpuError):
            if value := condition():
                return value
        if time.monotonic() > deadline_s:
            return None
        time.sleep(0.01)
