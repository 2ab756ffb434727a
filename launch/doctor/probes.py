"""Run probes of torch in processes of their own, which are killed at a deadline."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mgpu.protocol.internal.process.child import end_with_parent

_LOOK_S = 0.05
_KILLED_S = 5.0
_SHOWN = 400


@dataclass(frozen=True, slots=True)
class Trial:
    """Where probes put their files, on what environment theirs is built, and how long each group gets."""

    folder: Path
    environ: Mapping[str, str]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Probe:
    """The command line of ``python -m mgpu.worker.probes.torch_support``, and its environment."""

    arguments: tuple[str, ...]
    environ: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe said; ``problem`` is why it said nothing."""

    values: Mapping[str, Any]
    problem: str = ""


def run_groups(groups: Sequence[Sequence[Probe]], trial: Trial) -> list[list[Answer]]:
    """Run groups of probes side by side. When one of a group fails or the time is over, the rest of it is killed.

    A process that not even SIGKILL ends, as in a driver that hangs, is left behind.
    """
    running = [_Group(trial.folder, index) for index in range(len(groups))]
    until_s = time.monotonic() + trial.deadline_s
    try:
        for group, probes in zip(running, groups, strict=True):
            for probe in probes:
                group.start(probe)
        while not all(group.is_over() for group in running) and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
    finally:
        late = [not group.is_over() for group in running]
        for group in running:
            group.kill()
    text = f"no answer within {trial.deadline_s:g} s"
    return [group.answers(text if is_late else "") for group, is_late in zip(running, late, strict=True)]


class _Group:
    """Probes that need each other."""

    def __init__(self, folder: Path, index: int) -> None:
        self._stem = folder / f"probe-{os.getpid()}-{index}"
        self._members: list[tuple[subprocess.Popen[bytes], Path, Path]] = []

    def start(self, probe: Probe) -> None:
        out, err = (Path(f"{self._stem}-{len(self._members)}.{kind}") for kind in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "mgpu.worker.probes.torch_support", *probe.arguments],
                env=dict(probe.environ), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGKILL),
            )  # fmt: skip
        self._members.append((process, out, err))

    def is_over(self) -> bool:
        """Return True when all have ended or one has failed."""
        statuses = [process.poll() for process, _, _ in self._members]
        return None not in statuses or any(statuses)

    def kill(self) -> None:
        for process, _, _ in self._members:
            if process.poll() is None:
                process.kill()
        for process, _, _ in self._members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)

    def answers(self, late: str) -> list[Answer]:
        """Read what the probes said, and remove their files."""
        found = [_answer(*member, late) for member in self._members]
        for _, out, err in self._members:
            out.unlink(missing_ok=True)
            err.unlink(missing_ok=True)
        return found


def _answer(process: "subprocess.Popen[bytes]", out: Path, err: Path, late: str) -> Answer:
    lines = out.read_text(errors="replace").splitlines()
    if process.returncode == 0 and (values := _last_object(lines)) is not None:
        return Answer(values)
    said = [line.strip() for line in err.read_text(errors="replace").splitlines() if line.strip()]
    words = (said or [""])[-1][:_SHOWN]
    if process.returncode is None:
        return Answer({}, "it hangs and cannot even be killed")
    if late:
        return Answer({}, f"{late}{f': {words}' if words else ''}")
    if process.returncode == -signal.SIGKILL:
        return Answer({}, "")  # killed because another one failed
    ended = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
    return Answer({}, words or f"it ended with {ended}")


def _last_object(lines: Sequence[str]) -> dict[str, Any] | None:
    """Return the answer among what libraries write to standard output too, as NCCL does."""
    for line in reversed(lines):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return dict(json.loads(line))
    return None
