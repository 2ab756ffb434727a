"""Read the file of API keys: who may use the HTTP server.

Each line is a name, a space and a key; lines that begin with ``#`` are comments. Only digests are kept.
"""

import os
import re
import stat
from hashlib import sha256
from pathlib import Path

from mgpu.orchestrator.errors import UserError
from mgpu.protocol.internal.http_spec import ApiKey

MIN_KEY_CHARS = 16
MAX_KEYS = 1000
MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_KEY = re.compile(r"[!-~]{1,512}")
_WAY_OUT = "a line is a name, a space and a key, such as: alice sk-1f0c…; make a key with: openssl rand -hex 24"


class ApiKeysError(UserError):
    """The file of API keys cannot be used; the text says which line, and what to do. It never quotes a key."""


def read_api_keys(file: Path) -> list[ApiKey]:
    """Return the keys of a file. ApiKeysError when it is missing, damaged, or open to other users."""
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, key = line.strip().partition(" ")
        where = f"{file}, line {number}"
        if not _NAME.fullmatch(name) or not _KEY.fullmatch(key.strip()):
            raise ApiKeysError(f"{where}: {_WAY_OUT}")
        if len(key.strip()) < MIN_KEY_CHARS:
            raise ApiKeysError(
                f"{where}: the key of {name} has {len(key.strip())} characters, at least {MIN_KEY_CHARS}"
            )
        if name in keys:
            raise ApiKeysError(f"{where}: {name} has a key already")
        keys[name] = ApiKey(name, sha256(key.strip().encode()).digest())
    if len(keys) > MAX_KEYS:
        raise ApiKeysError(f"{file} has {len(keys)} keys, at most {MAX_KEYS} are allowed")
    if len({key.digest for key in keys.values()}) < len(keys):
        raise ApiKeysError(f"{file}: two names have the same key")
    return list(keys.values())


def _read(file: Path) -> str:
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block this process
        with os.fdopen(fd, "rb") as opened:
            _check(file, os.fstat(fd))
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ApiKeysError(f"cannot read the API keys in {file}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ApiKeysError(f"{file} is no file of API keys: it has more than {MAX_FILE_BYTES} bytes")
    return data.decode("ascii", "replace")


def _check(file: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ApiKeysError(f"{file} is no file of API keys: it is not a regular file")
    if found.st_mode & 0o027:
        mode = stat.S_IMODE(found.st_mode)
        raise ApiKeysError(f"others may read or change the API keys in {file} (mode {mode:04o}): chmod 600 {file}")
    if found.st_uid not in (0, os.geteuid()):
        raise ApiKeysError(f"{file} belongs to user {found.st_uid}, not to {os.geteuid()} or root")
