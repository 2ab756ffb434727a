"""Make one change in a copy of the repository and see whether a test notices it."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Literal

from bench.mutation.places import Change

WIDER = {
    "protocol/front": ("tests/protocol/front", "tests/protocol/client", "tests/orchestrator/gateway"),
    "protocol/client": ("tests/protocol/client", "tests/orchestrator/gateway"),
    "protocol/internal": ("tests/protocol/internal", "tests/orchestrator/gateway", "tests/orchestrator/processes"),
    "protocol/model": ("tests/protocol", "tests/orchestrator/placement", "tests/worker/layers"),
    "protocol/checkpoint": ("tests/protocol/checkpoint", "tests/orchestrator/models", "tests/worker/models"),
    "orchestrator/gateway": ("tests/orchestrator/gateway", "tests/protocol/client"),
    "orchestrator/engine": ("tests/orchestrator/engine", "tests/orchestrator/processes", "tests/orchestrator/host"),
    "orchestrator/processes": ("tests/orchestrator/processes", "tests/orchestrator/host"),
    "orchestrator/http": ("tests/orchestrator/http/routes", "tests/orchestrator/http"),
    "orchestrator": ("tests/orchestrator/test_server.py", "tests/orchestrator/processes"),
    "worker": ("tests/worker/start", "tests/worker/models", "tests/worker/steps", "tests/worker/layers"),
}
"""Other tests of a wing, for what its mirrored ones do not notice."""

Outcome = Literal["caught", "survived", "unsure", "no change"]
"""Unsure: the test that failed fails without the change too, on a busy machine for example."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a change."""

    change: Change
    outcome: Outcome
    by: str
    """The test that failed, "timeout", or nothing."""
    diff: str
    seconds: float


def copy_of(root: Path, target: Path) -> None:
    """Copy the tracked files, links as links."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).exists() or (root / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name, follow_symlinks=False)


def stages_for(root: Path, file: str) -> list[tuple[str, ...]]:
    """Return which tests are run one after the other: the file's own, those of its folder, and wider ones."""
    path = Path(file)
    folder = Path("tests") / path.parent
    while not (root / folder).is_dir():
        folder = folder.parent
    stages: list[tuple[str, ...]] = []
    own = tuple(str(each.relative_to(root)) for each in sorted((root / folder).glob(f"test_*{path.stem}*.py")))
    near = (str(folder),)
    for stage in (own, near, next((WIDER[wing] for wing in _wings_of(path) if wing in WIDER), ())):
        existing = tuple(each for each in stage if (root / each).exists())
        if existing and existing not in stages:
            stages.append(existing)
    return stages


def _wings_of(path: Path) -> list[str]:
    return [str(parent) for parent in path.parents if str(parent) != "."]


def try_change(copy: Path, change: Change, timeout_s: float, num_stages: int = 3) -> Trial:
    """Change a file of ``copy``, run tests until one fails, and restore the file."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    began_s, file = time.monotonic(), copy / change.file
    source = file.read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(change.operator)(), change.occurrence)
    if changed is None or changed == source:
        return Trial(change, "no change", "", "", 0.0)
    lines = unified_diff(source.splitlines(), changed.splitlines(), change.file, change.file, lineterm="", n=0)
    diff = "\n".join(line for line in lines if line[:3] not in ("---", "+++"))
    outcome: Outcome = "survived"
    by, stage = "", ()
    file.write_text(changed, encoding="utf-8")
    try:
        for stage in stages_for(copy, change.file)[:num_stages]:
            if by := run_tests(copy, stage, timeout_s):
                break
    finally:
        file.write_text(source, encoding="utf-8")
    if by:
        kind, _, test = by.partition(" ")
        again = (test,) if kind in ("FAILED", "ERROR") else stage
        outcome = "unsure" if run_tests(copy, again, timeout_s) else "caught"
    return Trial(change, outcome, by, diff, time.monotonic() - began_s)


def run_tests(copy: Path, tests: tuple[str, ...], timeout_s: float) -> str:
    """Run tests up to the first failure, and return its name; nothing if all pass."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--timeout=120", *tests]
    path = os.pathsep.join(filter(None, (str(copy / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode in (0, 5):  # 5: no test was collected
        return ""
    named = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return named[0].partition(" - ")[0] if named else f"pytest exit status {done.returncode}"
