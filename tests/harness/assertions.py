"""Assertions that many tests make of a text."""

from collections.abc import Container
from typing import TypeVar

T = TypeVar("T")


def assert_has_all(whole: Container[T], *parts: T) -> None:
    """Fail, showing the whole text, unless every part is in it."""
    missing = [part for part in parts if part not in whole]
    assert not missing, f"{missing} not in {whole}"
