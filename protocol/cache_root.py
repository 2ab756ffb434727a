"""Where mgpu keeps what it can fetch or make again: downloads, and kernels for the CPU."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder: MGPU_CACHE, else XDG_CACHE_HOME/mgpu, else ~/.cache/mgpu. RuntimeError without a home."""
    if own := environ.get("MGPU_CACHE"):
        return Path(own)
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mgpu"
