"""Read the header of a GGUF file on the hub without fetching the file, to plan it."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mgpu.orchestrator.errors import HubUnreachable
from mgpu.orchestrator.models.hub_errors import HubAnswer
from mgpu.orchestrator.models.hub_transfer import STALL_S, RemoteFile, pause_before_retry
from mgpu.protocol.checkpoint.files.gguf_file import read_gguf
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError

_FIRST_BYTES, _MOST_BYTES = 16 << 20, 256 << 20
"""How much is asked for at first, which most headers do not fill, and at most."""


def fetch_header(
    session: Any,
    file: RemoteFile,
    headers: Mapping[str, str],
    target: Path,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Write the beginning of a GGUF file to ``target``, as far as its header goes, in a file of the whole size.

    What follows is a hole. Small tensors at the beginning are there, such as stored rotary factors. HubUnreachable if
    there is no header, else the errors of the session, and `HubAnswer`.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    nbytes = _FIRST_BYTES
    try:
        while True:
            with open(scratch, "wb") as out:
                out.write(_beginning(session, file, headers, min(nbytes, file.size), pause))
                out.truncate(file.size)
            if _has_header(scratch):
                break
            if nbytes >= min(file.size, _MOST_BYTES):
                raise HubUnreachable(f"{file.name}: what the hub sends does not begin with the header of a GGUF file")
            nbytes *= 2
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def _has_header(path: Path) -> bool:
    """Return False if a header goes on in the hole: zeros are no header."""
    try:
        return bool(read_gguf(path, with_arrays=False).tensors)
    except CheckpointError:
        return False


def _beginning(
    session: Any, file: RemoteFile, headers: Mapping[str, str], nbytes: int, pause: Callable[[float], None]
) -> bytes:
    """Return the first bytes of a file, patiently."""
    tries = 0
    while True:
        try:
            return _received(session, file, {**headers, "Accept-Encoding": "identity"}, nbytes)
        except OSError:
            raise
        except Exception as error:
            wait_s = pause_before_retry(error, tries)
            if wait_s is None:
                raise
            pause(wait_s)
            tries += 1


def _received(session: Any, file: RemoteFile, headers: Mapping[str, str], nbytes: int) -> bytes:
    asked, data = {**headers, "Range": f"bytes=0-{nbytes - 1}"}, bytearray()
    with session.stream("GET", file.url, headers=asked, timeout=STALL_S, follow_redirects=True) as response:
        if response.status_code not in (200, 206):
            raise HubAnswer(response.status_code, response.headers, response.headers.get("X-Error-Code", ""))
        for chunk in response.iter_raw():
            data += chunk
            if len(data) >= nbytes:
                break
    if len(data) < nbytes:
        raise HubAnswer(503, code="the answer was cut off")
    return bytes(data[:nbytes])
