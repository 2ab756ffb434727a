"""Try peer access before workers rely on it: drivers have announced pairs of GPUs that hang, or that damage data.

A process of its own does it (`mgpu.worker.probes.pairs`), which is killed when a pair takes too long. A pair that fails
counts as one without peer access, and is named. What was found is kept until the machine boots again or gets another
driver, so only the first start pays for the trial.
"""

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mgpu.orchestrator.placement.machine.devices import Machine, worker_environment
from mgpu.protocol.internal.process.child import end_with_parent

SWITCH = "MGPU_PAIR_CHECK"
"""0: believe the driver."""
PAIR_RECORD = "peer-access.json"
"""The file in the cache that keeps verdicts."""
PAIR_S = 10.0
"""Longest wait for the verdict on one pair, and for the first one as much again: contexts are made before."""
_MOST_HANGS = 2
"""Pairs that may hang before the rest is not tried any more."""
_KILLED_S = 2.0
_COMMAND = (sys.executable, "-m", "mgpu.worker.probes.pairs")
HANGS = "it hangs"
Pair = tuple[int, int]
Verdicts = dict[Pair, str]
"""What is wrong with each pair that was tried; empty if nothing is."""


class NotTried(Exception):
    """Pairs could not be tried; the text says why."""


def announced_pairs(machine: Machine, ordinals: Sequence[int]) -> list[Pair]:
    """Return the pairs of some devices that reach each other by what the driver says."""
    if machine.kind != "cuda":
        return []
    devices = sorted(set(ordinals))
    return [
        (a, b)
        for a, b in itertools.combinations(devices, 2)
        if machine.peers(a, b) and machine.devices[a].uuid != machine.devices[b].uuid
    ]


def checked(
    machine: Machine,
    ordinals: Sequence[int],
    record: Path | None,
    environ: Mapping[str, str] = os.environ,
    command: Sequence[str] = _COMMAND,
) -> Machine:
    """Return the machine with pairs that fail a trial marked as broken, and a note for each.

    ``record``: the file that keeps verdicts. Pairs that cannot be tried keep what the driver says, with a note.
    """
    pairs = announced_pairs(machine, ordinals)
    if not pairs or environ.get(SWITCH) == "0":
        return machine
    known = read_record(record, machine)
    missing = [pair for pair in pairs if pair not in known]
    if missing:
        try:
            known |= try_pairs(machine, missing, environ, command)
        except NotTried as reason:
            return replace(machine, notes=(*machine.notes, f"peer access was not tried: {reason}"))
        write_record(record, machine, known)
    return with_verdicts(machine, {pair: known[pair] for pair in pairs if pair in known})


def with_verdicts(machine: Machine, verdicts: Verdicts) -> Machine:
    """Return the machine with broken pairs marked and named."""
    broken = {pair: problem for pair, problem in verdicts.items() if problem}
    if not broken:
        return machine
    links = [list(row) for row in machine.links]
    for a, b in broken:
        links[a][b] = links[b][a] = "broken"
    notes = tuple(
        f"peer access between GPUs {a} and {b} is announced and does not work: {problem}. Their data goes through host "
        "memory; an IOMMU or ACS may be the cause (mgpu-launch doctor tries again)"
        for (a, b), problem in broken.items()
    )
    return replace(machine, links=tuple(map(tuple, links)), notes=(*machine.notes, *notes))


def try_pairs(
    machine: Machine,
    pairs: Sequence[Pair],
    environ: Mapping[str, str],
    command: Sequence[str] = _COMMAND,
    pair_s: float = PAIR_S,
) -> Verdicts:
    """Return a verdict on every pair. NotTried if the driver cannot even be asked.

    A pair that hangs is found by its missing answer: the process ends there, and another one tries the pairs after it.
    If it cannot, the pair before it has damaged more than itself, so the rest counts as broken too.
    """
    verdicts: Verdicts = {}
    left = list(pairs)
    while left:
        try:
            answers = _run(machine, left, environ, command, pair_s)
        except NotTried as reason:
            if not verdicts:
                raise
            return verdicts | dict.fromkeys(left, f"not tried any more: {reason}")
        verdicts |= dict(zip(left, answers, strict=False))
        left = left[len(answers) :]
        if list(verdicts.values()).count(HANGS) >= _MOST_HANGS:
            verdicts |= dict.fromkeys(left, "not tried, because others hang")
            break
    return verdicts


def _run(
    machine: Machine, pairs: Sequence[Pair], environ: Mapping[str, str], command: Sequence[str], pair_s: float
) -> list[str]:
    """Return the verdicts of one process, in order; it may end early, and then the last one says so. NotTried."""
    added, _ = worker_environment(machine, pairs[0][0])
    try:
        process = start_trial([*command, *(f"{a}-{b}" for a, b in pairs)], {**environ, **added})
    except OSError as error:
        raise NotTried(str(error)) from None
    answers: list[str] = []
    try:
        for line in _lines(process, pair_s):
            answers.append(_problem_in(line))
    finally:
        was_running = process.poll() is None
        end_trial(process)
    if len(answers) == len(pairs):
        return answers
    if not was_running and not answers:
        raise NotTried(f"the trial ended with status {process.returncode}")
    return [*answers, HANGS if was_running else f"its trial ended with status {process.returncode}"]


def _problem_in(line: bytes) -> str:
    try:
        answer = json.loads(line)
        if "error" not in answer:
            return str(answer["problem"])
    except (ValueError, KeyError, TypeError):
        raise NotTried(f"the trial said {line[:80]!r}") from None
    raise NotTried(str(answer["error"]))


def _lines(process: "subprocess.Popen[bytes]", pair_s: float) -> Iterator[bytes]:
    """Yield lines until the process has no more of them, or the next one is late."""
    assert process.stdout is not None
    waited, until_s = b"", time.monotonic() + 2 * pair_s
    while select.select([process.stdout], [], [], max(0.0, until_s - time.monotonic()))[0]:
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)  # it is ending: its status is wanted
            return
        *lines, waited = (waited + piece).split(b"\n")
        until_s = time.monotonic() + pair_s if lines else until_s
        yield from lines


def start_trial(command: Sequence[str], environ: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a process that tries what may hang, and ends with this one. OSError if it cannot be started."""
    return subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGKILL),
    )  # fmt: skip


def end_trial(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process. One that hangs in the driver outlives even that, and is left behind."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILLED_S)
    if process.stdout is not None:
        process.stdout.close()


# -- what is kept ------------------------------------------------------------------------------------------------------


def read_record(record: Path | None, machine: Machine) -> Verdicts:
    """Return the verdicts on pairs of this machine that were found since it booted; empty if there are none."""
    try:
        kept = json.loads(record.read_text()) if record is not None else {}
        if kept.get("since") != _since():
            return {}
        numbers = {device.uuid: device.ordinal for device in machine.devices}
        pairs = ((str(a), str(b), str(problem)) for a, b, problem in kept["pairs"])
        found = {(numbers[a], numbers[b]): problem for a, b, problem in pairs if {a, b} <= numbers.keys()}
        return {(min(pair), max(pair)): problem for pair, problem in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a record that cannot be read is like none: the pairs are tried again


def write_record(record: Path | None, machine: Machine, verdicts: Verdicts) -> None:
    """Keep verdicts; those of GPUs that are not visible now are forgotten. Nothing happens if it cannot be written."""
    if record is None:
        return
    uuids = [device.uuid for device in machine.devices]
    pairs = [[uuids[a], uuids[b], problem] for (a, b), problem in verdicts.items()]
    part = record.with_name(f"{record.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        part.write_text(json.dumps({"since": _since(), "pairs": pairs}))
        part.replace(record)


def _since() -> str:
    """Return what changes when verdicts may change: the boot, and the driver."""
    texts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/sys/module/nvidia/version"):
        with contextlib.suppress(OSError):
            texts.append(Path(path).read_text().strip())
    return " ".join(texts)
