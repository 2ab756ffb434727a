"""Make one change in a copy of the repository and see whether a test notices it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
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
"""Unsure: the tests end badly with the change and without it, and no single test is to blame."""


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
    """Copy what belongs to the repository, links as links; not environments, caches and other hidden folders."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(root, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)


def stages_for(root: Path, file: str) -> list[tuple[str, ...]]:
    """Return which tests run one after the other: the file's own, those that import it, its folder's, wider ones."""
    path = Path(file)
    folder = Path("tests") / path.parent
    while not (root / folder).is_dir():
        folder = folder.parent
    stages: list[tuple[str, ...]] = []
    own = tuple(str(each.relative_to(root)) for each in sorted((root / folder).glob(f"test_*{path.stem}*.py")))
    near = (str(folder),)
    for stage in (
        own,
        importers(root, path),
        near,
        next((WIDER[wing] for wing in _wings_of(path) if wing in WIDER), ()),
    ):
        existing = tuple(each for each in stage if (root / each).exists())
        if existing and existing not in stages:
            stages.append(existing)
    return stages


def importers(root: Path, path: Path) -> tuple[str, ...]:
    """Return the test files that name the module of a file, end-to-end tests left out."""
    package, module = ".".join(("mgpu", *path.parent.parts)), path.stem
    named = re.compile(rf"{re.escape(package)}(\.{module}\b| import .*\b{module}\b)")
    found = (each for each in sorted((root / "tests").rglob("test_*.py")) if "e2e" not in each.parts)
    return tuple(str(each.relative_to(root)) for each in found if named.search(each.read_text(encoding="utf-8")))


def _wings_of(path: Path) -> list[str]:
    return [str(parent) for parent in path.parents if str(parent) != "."]


@dataclass(slots=True)
class Suite:
    """The tests of one copy of the repository."""

    copy: Path
    timeout_s: float = 900.0
    """For one stage."""
    core: int | None = None
    """The only core that they may use, so that trials beside them do not slow them down."""
    failing: set[str] = field(default_factory=set)
    """Suite that fail without any change, on this machine: left out from then on. All copies share one set."""

    def run(self, stage: tuple[str, ...], passed: Collection[str] = ()) -> str:
        """Run tests, but not those that passed, up to the first failure; return its name, or nothing if all pass."""
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--timeout=100", *stage]
        left_out = [*sorted(self.failing), *(each for each in passed if each not in stage)]
        command += [f"--deselect={test}" if "::" in test else f"--ignore={test}" for test in left_out]
        if self.core is not None:
            command = ["taskset", "-c", str(self.core), *command]
        path = os.pathsep.join(filter(None, (str(self.copy / "src"), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(
            command, cwd=self.copy, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as child:
            try:
                output, _ = child.communicate(timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                return "timeout"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        if child.returncode in (0, 5):  # 5: no test was collected
            return ""
        named = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return named[0].partition(" - ")[0] if named else f"pytest exit status {child.returncode}"


def try_change(tests: Suite, change: Change, num_stages: int = 4) -> Trial:
    """Change a file of a copy, run tests until one fails that passes without the change, and restore the file."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    began_s, file = time.monotonic(), tests.copy / change.file
    source = file.read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(change.operator)(), change.occurrence)
    if changed is None or changed == source:
        return Trial(change, "no change", "", "", 0.0)
    lines = unified_diff(source.splitlines(), changed.splitlines(), change.file, change.file, lineterm="", n=0)
    diff = "\n".join(line for line in lines if line[:3] not in ("---", "+++"))
    outcome: Outcome = "survived"
    by = ""
    passed: list[str] = []
    for stage in stages_for(tests.copy, change.file)[:num_stages]:
        while outcome == "survived":
            file.write_text(changed, encoding="utf-8")
            try:
                by = tests.run(stage, passed)
            finally:
                file.write_text(source, encoding="utf-8")
            if not by:
                passed += stage
                break
            kind, _, test = by.partition(" ")
            named = kind in ("FAILED", "ERROR")
            if not tests.run((test,) if named else stage):
                outcome = "caught"
            elif named and test not in tests.failing:
                tests.failing.add(test)
            else:
                outcome = "unsure"
    return Trial(change, outcome, by, diff, time.monotonic() - began_s)
