"""Remove what NVIDIA's driver leaves in /dev/shm when a worker is killed.

A process that shares GPU memory has a small file there, ``cuda.shm.<user>.<process id, hexadecimal>.<number>``. The
driver removes it when the process ends in good order. After SIGKILL it stays, so a survivor removes it: the
parent after a worker's death, the gateway after the parent's, and the next start after the death of all.

Only files of processes that this server has started are touched. Their ids are noted in the runtime folder, each with
the PID namespace that it belongs to: containers may share /dev/shm, and the same number is another process there.
"""

import contextlib
import os
import select
import time
from collections.abc import Iterable
from pathlib import Path

RECORD_NAME = "workers"
SHARED_MEMORY = Path("/dev/shm")
_NAMESPACE = Path("/proc/self/ns/pid")


def write_record(folder: Path, process_ids: Iterable[int]) -> None:
    """Note the workers of a server in its runtime folder. Where that fails, their files stay: 4 KiB each."""
    with contextlib.suppress(OSError):
        (folder / RECORD_NAME).write_text("".join(f"{_namespace()} {each}\n" for each in sorted(process_ids)))


def read_records(folder: Path) -> list[int]:
    """Return the processes of this PID namespace that are noted in a runtime folder, or in those of copies in it.

    Another start may remove the folder meanwhile.
    """
    found: list[int] = []
    for parent, _, names in os.walk(folder):  # passes over what has gone; Path.rglob raises then
        if RECORD_NAME not in names:
            continue
        with contextlib.suppress(OSError, ValueError):
            lines = [line.split() for line in (Path(parent) / RECORD_NAME).read_text().splitlines()]
            found += [int(line[1]) for line in lines if len(line) == 2 and line[0] == _namespace()]
    return found


def remove_driver_files(process_ids: Iterable[int], wait_s: float = 0.0) -> list[str]:
    """Remove the files of processes that have ended, and return their names.

    One that still ends is waited for, up to ``wait_s`` in all. Files of a process that lives stay.
    """
    removed: list[str] = []
    deadline_s = time.monotonic() + wait_s
    for process_id in process_ids:
        files = list(SHARED_MEMORY.glob(f"cuda.shm.{os.geteuid()}.{process_id:x}.*"))
        if files and _has_ended(process_id, deadline_s - time.monotonic()):
            for file in files:
                with contextlib.suppress(OSError):
                    file.unlink()
                    removed.append(file.name)
    return removed


def _has_ended(process_id: int, wait_s: float) -> bool:
    try:
        descriptor = os.pidfd_open(process_id)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        return bool(select.select([descriptor], [], [], max(0.0, wait_s))[0])
    finally:
        os.close(descriptor)


def _namespace() -> str:
    """Return the number of the PID namespace of this process; a dash if it is not known."""
    try:
        return str(_NAMESPACE.stat().st_ino)
    except OSError:
        return "-"
