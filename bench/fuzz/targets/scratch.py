"""Files in memory for targets that read files."""

import os
import tempfile
from functools import cache
from pathlib import Path


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    """Return a folder that lasts as long as this process, in memory where that is possible."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="mgpu-fuzz-", dir=base)


def written(name: str, data: bytes, longer: int = 0) -> Path:
    """Write a file and return its path. ``longer``: bytes that it has beyond ``data`` without holding them."""
    path = Path(_folder().name) / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        if longer:
            file.truncate(len(data) + longer)
    return path
