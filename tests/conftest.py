"""Let every process that a test starts import `harness` and `bench`, as pytest itself does (see pyproject.toml)."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]

os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
)
