"""What the tests of this folder share: the helpers that lie beside them, and a folder for a server."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: unix sockets have at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="mgpu"))
    yield path
    shutil.rmtree(path, ignore_errors=True)  # the orphans of a killed server remove their files at the same time
