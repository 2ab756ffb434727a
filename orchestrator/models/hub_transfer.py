"""Download one file of the hub: resumed where an earlier attempt ended, checked, and put in place by one rename."""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mgpu.orchestrator.errors import HubUnreachable, ModelError
from mgpu.orchestrator.models.download_progress import size_text
from mgpu.orchestrator.models.hub_errors import HubAnswer, is_passing

STALL_S = 10.0
"""How long the hub may send nothing."""
_TRIES = 5
"""Attempts in a row that bring no new byte."""
_PATIENCE_S = 60.0
"""The longest pause that the hub may ask for."""
_BUSY_S = 120.0
"""How long a file of another process may stand still before this one gives up."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the hub lists it. Large files have a ``sha256``, others git's SHA-1; both may be unknown ('')."""

    name: str
    url: str
    size: int
    sha256: str
    git_sha1: str


def download(
    session: Any,
    file: RemoteFile,
    headers: Mapping[str, str],
    target: Path,
    on_bytes: Callable[[int], None],
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Have ``file`` at ``target``. What an earlier attempt left is kept, unless its bytes turn out to be wrong.

    ``session`` is that of huggingface_hub. HubUnreachable when other bytes come than the hub lists; else the errors of
    the session, and `HubAnswer`.
    """
    partial = target.with_name(target.name + ".mgpu-partial")
    is_done = False
    while not is_done:
        with open(partial, "ab") as out:
            _lock(out, target, pause)
            if target.exists():  # another process was faster
                partial.unlink(missing_ok=True)
                return
            if not _is_at(out, partial):  # another process has removed it
                continue
            if out.tell() > file.size:
                out.truncate(0)
            _fetch_rest(session, file, headers, out, on_bytes, pause)
            out.flush()
            os.fsync(out.fileno())
            _check(file, partial)
            os.replace(partial, target)
            is_done = True


def _is_at(out: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(out.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def partial_bytes(target: Path, size: int) -> int:
    """Return how many bytes of ``target`` an earlier download left."""
    partial = target.with_name(target.name + ".mgpu-partial")
    found = partial.stat().st_size if partial.is_file() else 0
    return found if found <= size else 0


def _lock(out: BinaryIO, target: Path, pause: Callable[[float], None]) -> None:
    """Wait until no other process downloads the file. HubUnreachable if that one stands still."""
    size, still_s = -1, 0.0
    while True:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            out.seek(0, os.SEEK_END)
            return
        except BlockingIOError:
            if (found := os.fstat(out.fileno()).st_size) != size:
                size, still_s = found, 0.0
            elif still_s >= _BUSY_S:
                raise HubUnreachable(
                    f"another process downloads {target.name} and has received nothing for {_BUSY_S:.0f} s"
                ) from None
            pause(1.0)
            still_s += 1.0


def _fetch_rest(
    session: Any,
    file: RemoteFile,
    headers: Mapping[str, str],
    out: BinaryIO,
    on_bytes: Callable[[int], None],
    pause: Callable[[float], None],
) -> None:
    tries = 0
    while (start := out.tell()) < file.size:
        try:
            _receive(session, file, headers, out, on_bytes)
        except (ModelError, OSError):  # OSError: the disk; those of the network have classes of their own
            raise
        except Exception as error:
            tries = tries + 1 if out.tell() <= start else 0
            wait_s = pause_before_retry(error, tries)
            if wait_s is None:
                raise
            pause(wait_s)


def pause_before_retry(error: Exception, tries: int) -> float | None:
    """Return how long to wait before the next attempt; None to give up."""
    if isinstance(error, HubAnswer):
        if not is_passing(error.status):
            return None
        if error.retry_after_s is not None and error.retry_after_s > _PATIENCE_S:
            return None
        wait_s = error.retry_after_s
    else:
        wait_s = None
    if tries >= _TRIES:
        return None
    return wait_s if wait_s is not None else min(0.5 * 2**tries, 8.0)


def _receive(
    session: Any, file: RemoteFile, headers: Mapping[str, str], out: BinaryIO, on_bytes: Callable[[int], None]
) -> None:
    """Append what one answer brings."""
    start = out.tell()
    asked = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with session.stream("GET", file.url, headers=asked, timeout=STALL_S, follow_redirects=True) as response:
        status = response.status_code
        if status == 416 or (start and status == 200):  # the hub cannot resume: from the beginning
            on_bytes(-start)
            out.truncate(0)
            out.seek(0)
            if status == 416:
                return
        elif status not in (200, 206):
            raise HubAnswer(status, response.headers, response.headers.get("X-Error-Code", ""))
        _check_length(file, response, out.tell())
        for chunk in response.iter_raw():
            if out.tell() + len(chunk) > file.size:
                raise HubUnreachable(f"{file.name}: the hub sends more than the {file.size} bytes that it lists")
            out.write(chunk)
            on_bytes(len(chunk))
    if out.tell() < file.size:
        raise HubAnswer(503, code="the answer was cut off")


def _check_length(file: RemoteFile, response: Any, start: int) -> None:
    """Raise HubUnreachable unless the answer is as long as the rest of the file."""
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) != file.size - start:
        kind = response.headers.get("Content-Type", "").split(";")[0]
        page = " (a page of a proxy?)" if kind == "text/html" else ""
        raise HubUnreachable(
            f"{file.name}: the hub lists {size_text(file.size)}, and sends {size_text(start + int(length))}{page}"
        )


def _check(file: RemoteFile, partial: Path) -> None:
    """Remove the bytes and raise HubUnreachable unless they have the digest that the hub lists."""
    listed = file.sha256 or file.git_sha1
    if not listed:
        return
    with open(partial, "rb") as data:
        if file.sha256:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        else:  # git digests a header, too
            found = hashlib.sha1(b"blob %d\0" % file.size + data.read(), usedforsecurity=False).hexdigest()
    if found != listed:
        partial.unlink()
        raise HubUnreachable(f"{file.name}: what came has the digest {found}, and the hub lists {listed}")
