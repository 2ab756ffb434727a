"""The small real model that end-to-end tests serve."""

import fcntl
import os
import tempfile
from functools import cache
from pathlib import Path

from mgpu.orchestrator.models.find import resolve_model


@cache
def demo_model() -> str:
    """Return the path of SmolLM2-135M-Instruct. Of several test processes one fetches it, and the others wait."""
    with (Path(tempfile.gettempdir()) / f"mgpu-tests-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return str(resolve_model("demo").path)
