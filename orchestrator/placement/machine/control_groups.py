"""Read what this process's control groups allow: memory, CPU time and processes, in versions 1 and 2.

A limit may stand at the group itself, at the root of a container, or at any group between, such as a unit's MemoryMax.
All of them hold, so the least counts. ``root`` is the root of the file system; tests pass an imitated one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_DEFAULT_MOUNTS = {"": "sys/fs/cgroup", "memory": "sys/fs/cgroup/memory", "cpu": "sys/fs/cgroup/cpu",
                   "pids": "sys/fs/cgroup/pids"}  # fmt: skip
"""Where version 2 ("") and the controllers of version 1 are mounted, when the kernel does not tell."""
_FILE_PAGES_V2 = ("inactive_file", "active_file")
_FILE_PAGES_V1 = ("total_inactive_file", "total_active_file")
"""Pages that the kernel can drop. `file` would count shared memory too, which it cannot."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The limit of one group, and what of it is in use and cannot be dropped."""

    limit_bytes: int
    used_bytes: int


def memory_within_limits(total_bytes: int, free_bytes: int, root: Path = ROOT) -> tuple[int, int]:
    """Return total and free bytes of a machine, cut to the limits of all groups of this process."""
    for each in memory_limits(root):
        total_bytes = min(total_bytes, each.limit_bytes)
        free_bytes = min(free_bytes, max(0, each.limit_bytes - each.used_bytes))
    return total_bytes, free_bytes


def memory_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """Return the memory limits of this process's groups and of all groups above them."""
    found = [_memory_limit(group, "memory.max", "memory.current", _FILE_PAGES_V2) for group in _groups("", root)]
    found += [
        _memory_limit(group, "memory.limit_in_bytes", "memory.usage_in_bytes", _FILE_PAGES_V1)
        for group in _groups("memory", root)
    ]
    return [each for each in found if each is not None]


def tasks_limits(root: Path = ROOT) -> list[tuple[int, int]]:
    """Return, for each group with a limit of processes and threads, the limit and how many there are."""
    found = []
    for controller in ("", "pids"):
        for group in _groups(controller, root):
            limit, used = _text(group / "pids.max"), _text(group / "pids.current")
            if limit.isdecimal() and used.isdecimal():
                found.append((int(limit), int(used)))
    return found


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the number of CPUs whose time this process may use, such as 0.5; None without a limit."""
    quotas = []
    for group in _groups("", root):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        quotas.append((quota, period))
    for group in _groups("cpu", root):
        quotas.append((_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")))
    return min(
        (int(quota) / int(period) for quota, period in quotas if quota.isdecimal() and _is_positive(period)),
        default=None,
    )


def usable_cpus(affinity: int, root: Path = ROOT) -> int:
    """Return how many threads can run at once, at least 1: cores by affinity, cut to the whole CPUs of the quota.

    A thread above the quota makes all threads of a step wait: with 0.6 CPUs, two threads are slower than one.
    """
    quota = cpu_quota(root)
    return max(1, affinity if quota is None else min(affinity, int(quota)))


def _memory_limit(group: Path, limit_name: str, used_name: str, file_pages: tuple[str, ...]) -> MemoryLimit | None:
    limit, used = _text(group / limit_name), _text(group / used_name)
    if not limit.isdecimal() or not used.isdecimal():
        return None
    lines = (line.split() for line in _text(group / "memory.stat").splitlines())
    pages = sum(int(words[1]) for words in lines if len(words) == 2 and words[0] in file_pages)
    return MemoryLimit(int(limit), max(0, int(used) - pages))


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield this process's group of a controller of version 1, or of version 2 (""), and all groups above it."""
    own = _own_group(controller, root)
    if own is None:
        return
    mount, inside = _mount(controller, root)
    relative = Path("/" + own).relative_to(inside) if Path("/" + own).is_relative_to(inside) else Path()
    if ".." in relative.parts:  # above the root of a namespace: of these groups only the mounted one can be read
        relative = Path()
    group = mount / relative
    yield group
    for _ in relative.parts:
        group = group.parent
        yield group


def _own_group(controller: str, root: Path) -> str | None:
    """Return the path of this process's group without the first slash; None if it has none for the controller."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(","):
            return path.lstrip("/")
    return None


def _mount(controller: str, root: Path) -> tuple[Path, Path]:
    """Return where a hierarchy is mounted, and which of its groups is mounted there."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        words, (kind, _, options) = before.split(), (*after.split(), "", "", "")[:3]
        if len(words) < 5 or kind != ("cgroup" if controller else "cgroup2"):
            continue
        if not controller or controller in options.split(","):
            return root / _unescaped(words[4]).lstrip("/"), Path(_unescaped(words[3]))
    return root / _DEFAULT_MOUNTS[controller], Path("/")


def _unescaped(text: str) -> str:
    """Return a path of mountinfo as it is: blanks are written as octal numbers there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="surrogateescape").strip()
    except OSError:
        return ""


def _is_positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0
