"""The limits on processes and threads that a server may run into, and what is left of them."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.machine.control_groups import tasks_limits

TASKS_NEEDED = 200
"""Processes and threads of a small server: torch, the tokenizer and libzmq start several threads a process each."""
ULIMIT = "ulimit -u"
NEAR = 32
"""With fewer left, the limit may be why a process has just died: its own processes and threads are gone by now."""
_PARENT, _GATEWAY, _HTTP, _WORKER = 2, 6, 4, 5
"""Processes and threads of each: measured on the CPU, where a worker has as many threads more as it computes with."""
_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24


@dataclass(frozen=True, slots=True)
class TaskLimit:
    """A limit of processes and threads. ``name`` is what sets it, ``way_out`` how to raise it."""

    name: str
    most: int
    used: int
    way_out: str

    @property
    def left(self) -> int:
        return max(0, self.most - self.used)


def tasks_of_server(workers: int, threads_each: int, http: bool) -> int:
    """Return how many processes and threads a server starts, at least."""
    return _PARENT + _GATEWAY + (_HTTP if http else 0) + workers * (_WORKER + max(1, threads_each))


def check_task_limit(needed: int) -> None:
    """Raise UserError if ``needed`` processes and threads cannot be started: libraries abort where one fails."""
    limit = least_task_limit()
    if limit is not None and limit.left < needed:
        raise UserError(
            f"this server starts at least {needed} processes and threads, and {limit.name} allows {limit.most}, of "
            f"which {limit.used} run: raise it first ({limit.way_out})"
        )


def task_limit_hint() -> str:
    """Return a remark for the death of a process if a limit is near; else an empty text."""
    limit = least_task_limit()
    if limit is None or limit.left >= NEAR:
        return ""
    return (
        f"; perhaps no further thread could be started: {limit.name} allows {limit.most}, and {limit.used} run "
        f"({limit.way_out})"
    )


def least_task_limit(root: Path = Path("/")) -> TaskLimit | None:
    """Return the limit of processes and threads of which least is left; None if there is none."""
    found = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and not _is_exempt():
        found.append(TaskLimit(ULIMIT, soft, _tasks_of_user(), "ulimit -u 4096, or LimitNPROC= in a unit"))
    for limit, used in tasks_limits(root):
        way_out = "TasksMax= of the unit, or --pids-limit of the container"
        found.append(TaskLimit("a control group (pids.max)", limit, used, way_out))
    return min(found, key=lambda each: each.left, default=None)


def _is_exempt() -> bool:
    """Return True if the kernel does not count this process's user, as for root."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return os.geteuid() == 0
    effective = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    return os.getuid() == 0 or bool(effective >> _CAP_SYS_ADMIN & 1) or bool(effective >> _CAP_SYS_RESOURCE & 1)


def _tasks_of_user() -> int:
    """Count this user's threads, which is what the kernel counts."""
    uid, count = os.getuid(), 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == uid:
            count += process.info["num_threads"] or 1
    return count
