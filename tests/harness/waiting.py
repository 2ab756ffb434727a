"""Wait for what no event announces, with a deadline that fails the test."""

from collections.abc import Callable
from typing import TypeVar

from bench.waiting import wait_until

T = TypeVar("T")
DEADLINE_S = 60.0
"""Far longer than anything takes, so that a busy machine fails no test."""


def eventually(
    condition: Callable[[], T], message: str | Callable[[], object] = "", timeout_s: float = DEADLINE_S
) -> T:
    """Return the first true value of ``condition``. AssertionError with ``message`` after ``timeout_s``."""
    value = wait_until(condition, timeout_s)
    assert value, f"waited {timeout_s:g} s in vain: {message() if callable(message) else message}"
    return value
