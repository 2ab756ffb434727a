"""Keys of the front channel: the files that hold them, and how a socket uses them (CURVE, RFC 26).

A key file is text. Each line is a name, a space and a key in Z85 (RFC 32); lines that begin with ``#`` are comments.
``secret`` is one's own secret key, ``public`` a public one, ``server`` the server's public key. A file with a secret
key is refused if anybody but its owner can read it.
"""

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from mgpu.protocol.errors import MgpuError

KEYS_VARIABLE = "MGPU_KEYS"
KEY_BYTES = 32
Z85_CHARS = 40
MAX_FILE_BYTES = 4096


class KeyFileError(MgpuError):
    """A key file is missing, damaged or readable to others; the text says what to do."""


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a client needs: its own key pair and the server's public key, 32 bytes each."""

    secret: bytes = field(repr=False)
    public: bytes
    server: bytes


def fingerprint(public: bytes) -> str:
    """Return the short name of a public key: 32 hexadecimal digits, the first half of its SHA-256."""
    return sha256(public).hexdigest()[:32]


def new_pair() -> tuple[bytes, bytes]:
    """Return a new key pair: public and secret, 32 bytes each."""
    check_curve()
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


def public_of(secret: bytes) -> bytes:
    """Return the public key that belongs to a secret one."""
    return z85.decode(zmq.curve_public(z85.encode(secret)))


def check_curve() -> None:
    """Raise KeyFileError if this libzmq cannot encrypt."""
    if not zmq.has("curve"):
        raise KeyFileError("this libzmq was built without CURVE; install pyzmq from its wheel: pip install pyzmq")


def key_text(public_or_secret: bytes) -> str:
    """Return a key in the form that key files use."""
    return z85.encode(public_or_secret).decode("ascii")


def read_keys(path: Path, *names: str, is_secret: bool, check_mode: bool = True) -> dict[str, bytes]:
    """Read a key file that must hold exactly ``names``. KeyFileError says what is wrong with it.

    If ``is_secret``, the file must belong to this user or root and be closed to everybody else. ``check_mode`` is False
    where something else, such as systemd, guards the folder.
    """
    found = _parse(path, _read(path, is_secret and check_mode))
    if set(found) != set(names):
        wanted = " and ".join(f"{name!r}" for name in names)
        raise KeyFileError(f"{path} has {len(found)} keys, but must hold just {wanted}; is it another kind of file?")
    return found


def read_client_keys(path: str | Path) -> ClientKeys:
    """Read a client's key file, as `mgpu-launch keygen --client NAME` makes it. KeyFileError when it cannot be used."""
    check_curve()
    path = Path(path)
    if path.is_dir():
        raise KeyFileError(f"{path} is a folder; a client needs its own key file, such as {path / 'NAME.client'}")
    found = read_keys(path, "secret", "server", is_secret=True)
    return ClientKeys(found["secret"], public_of(found["secret"]), found["server"])


def find_client_keys(path: str | Path | None, environ: Mapping[str, str] | None = None) -> ClientKeys | None:
    """Read the key file ``path``, else the one that MGPU_KEYS names; None when neither is given."""
    path = path or (os.environ if environ is None else environ).get(KEYS_VARIABLE)
    return read_client_keys(path) if path else None


def use_client_keys(socket: "zmq.Socket[Any]", keys: ClientKeys) -> None:
    """Make a client's socket encrypt and prove its identity; call it before connecting."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)


def use_server_key(socket: "zmq.Socket[Any]", secret: bytes) -> None:
    """Make a server's socket demand encryption; call it before binding. ZAP decides who may connect."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def _read(path: Path, private: bool) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block this process
        with os.fdopen(fd, "rb") as file:
            _check_file(path, os.fstat(fd), private)
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}; see mgpu-launch keygen") from None
    if len(data) > MAX_FILE_BYTES:
        raise KeyFileError(f"{path} is no key file: it has more than {MAX_FILE_BYTES} bytes")
    return data.decode("ascii", "replace")


def _check_file(path: Path, found: os.stat_result, private: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise KeyFileError(f"{path} is no key file: it is not a regular file")
    if not private:
        return
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise KeyFileError(f"others may read or change the secret key in {path} (mode {mode:04o}): chmod 600 {path}")
    if found.st_uid not in (0, os.geteuid()):
        raise KeyFileError(f"the secret key in {path} belongs to user {found.st_uid}, not to {os.geteuid()} or root")


def _parse(path: Path, text: str) -> dict[str, bytes]:
    """Return the keys by name. Errors never quote the file, since a damaged line may hold a secret."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.strip().partition(" ")
        key = _decoded(value)
        if key is None or name in keys:
            raise KeyFileError(
                f"{path}, line {number}: damaged; expected a name, a space and a key of {Z85_CHARS} characters"
            )
        keys[name] = key
    return keys


def _decoded(text: str) -> bytes | None:
    if len(text) != Z85_CHARS:
        return None
    try:
        return z85.decode(text)
    except (ValueError, KeyError, struct.error):  # not ASCII; not a digit; digits that make too large a number
        return None
