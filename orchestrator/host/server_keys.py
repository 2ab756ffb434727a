"""Load the server's secret key and the list of clients that may connect, from a folder or from systemd's credentials.

A keys folder, as `mgpu-launch keygen` makes it: ``server.secret``, ``server.public`` for clients to copy, and
``clients/NAME.public`` for everyone who may connect. systemd passes a folder on as flat files ``keys_server.secret``,
``keys_clients_NAME.public`` in ``$CREDENTIALS_DIRECTORY``.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mgpu.orchestrator.errors import UserError
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.keys import KeyFileError, check_curve, fingerprint, public_of, read_keys

SECRET_NAME = "server.secret"
PUBLIC_NAME = "server.public"
CLIENTS_NAME = "clients"
WORKERS_NAME = "workers"
PUBLIC_SUFFIX = ".public"
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
CREDENTIAL = "keys"
MAX_CLIENTS = 1000
"""All of them are part of a gateway's spec, which must fit into a pipe."""


@dataclass(frozen=True, slots=True)
class WorkerKeys:
    """The server's secret key, and the public keys of the hosts that may join it with workers."""

    secret: bytes = field(repr=False)
    workers: tuple[bytes, ...]


class KeysError(UserError):
    """The keys cannot be used; the text says which file, and what to do."""


def load_server_keys(folder: str, environ: Mapping[str, str], needs_clients: bool = True) -> ServerKeys | None:
    """Load the keys of ``folder``; without a folder those that systemd passes on; None when there are none either.

    KeysError when a file is missing, damaged or, if it is secret, open to others. Also when no client has a key, unless
    ``needs_clients`` is False: the last key may be removed while the server runs.
    """
    try:
        if folder:
            return _from_folder(Path(folder), needs_clients)
        if credentials := environ.get(CREDENTIALS_VARIABLE):
            return _from_credentials(Path(credentials))
    except KeyFileError as error:
        raise KeysError(str(error)) from None
    return None


def load_worker_keys(folder: str) -> WorkerKeys:
    """Load the keys of ``folder`` for hosts that join. They are a list of their own: a worker sees all requests.

    KeysError as `load_server_keys`, also when no worker has a key.
    """
    try:
        own, listed = _listed_keys(Path(folder), WORKERS_NAME, "worker", True)
    except KeyFileError as error:
        raise KeysError(str(error)) from None
    return WorkerKeys(own, tuple(listed))


def describe(keys: ServerKeys) -> str:
    """Return, for the log, whose keys these are; nothing in it is secret."""
    clients = ", ".join(map(fingerprint, keys.clients[:8])) + (", …" if len(keys.clients) > 8 else "")
    return f"server key {fingerprint(public_of(keys.secret))}; {len(keys.clients)} client keys may connect: {clients}"


def _from_folder(folder: Path, needs_clients: bool) -> ServerKeys:
    return ServerKeys(*_listed_keys(folder, CLIENTS_NAME, "client", needs_clients))


def _listed_keys(folder: Path, list_name: str, kind: str, needs_any: bool) -> tuple[bytes, list[bytes]]:
    """Return the secret key of a folder, and the public keys of one of its lists."""
    secret, clients = folder / SECRET_NAME, folder / list_name
    if folder.is_file():
        raise KeysError(f"{folder} is a file, such as a client has; a server needs its folder of keys: --keys FOLDER")
    if not folder.is_dir():
        raise KeysError(f"{folder} is no folder of keys; make one with: mgpu-launch keygen --out {folder}")
    if not os.path.lexists(secret):
        raise KeysError(f"{secret} is missing; make it with: mgpu-launch keygen --out {folder}")
    if kind != "client" and not clients.is_dir():
        raise KeysError(_no_keys(folder, clients, kind))
    for place in (folder, clients):
        _check_writers(place)
    try:
        listed = sorted(path for path in clients.iterdir() if path.suffix == PUBLIC_SUFFIX)
    except OSError as error:
        raise KeysError(f"cannot list the {kind} keys in {clients}: {error.strerror}") from None
    if needs_any and not listed:
        raise KeysError(_no_keys(folder, clients, kind))
    for file in listed:
        _check_writers(file)
    return _load(secret, listed, check_mode=True)


def _no_keys(folder: Path, listed: Path, kind: str) -> str:
    return (
        f"{listed} has no *{PUBLIC_SUFFIX} file, so nobody could connect; make a {kind}'s key with: "
        f"mgpu-launch keygen --out {folder} --{kind} NAME"
    )


def _check_writers(path: Path) -> None:
    """Raise KeysError when another user could put a client on the list by changing ``path``, as sshd's StrictModes.

    A link is judged itself by the folder that it lies in, and here by what it leads to, with the folder of that.
    """
    places = [path, path.resolve().parent] if path.is_symlink() else [path]
    for place in places:
        try:
            found = place.stat()
        except OSError as error:
            raise KeysError(f"cannot look at {place}: {error.strerror}") from None
        if found.st_uid not in (0, os.geteuid()):
            raise KeysError(
                f"{place} belongs to user {found.st_uid}, not to {os.geteuid()} or root, who could let anybody in: "
                f"chown {os.geteuid()} {place}"
            )
        if found.st_mode & 0o022:
            mode = stat.S_IMODE(found.st_mode)
            raise KeysError(
                f"other users may change {place} (mode {mode:04o}), and so let anybody in: chmod go-w {place}"
            )


def _from_credentials(folder: Path) -> ServerKeys | None:
    """Load what systemd passes on. It guards the folder itself, with access lists that a file's mode does not show."""
    secret = folder / f"{CREDENTIAL}_{SECRET_NAME}"
    if not secret.exists():
        _check_plain_credential(folder / CREDENTIAL)
        return None
    listed = sorted(folder.glob(f"{CREDENTIAL}_{CLIENTS_NAME}_*{PUBLIC_SUFFIX}"))
    if not listed:
        raise KeysError(
            f"the service's keys have no {CLIENTS_NAME}/NAME{PUBLIC_SUFFIX}, so nobody could connect; make a client's "
            "key with: mgpu-launch keygen --out /etc/mgpu/INSTANCE.keys --client NAME"
        )
    return ServerKeys(*_load(secret, listed, check_mode=False))


def _check_plain_credential(file: Path) -> None:
    """Refuse a keys file. Only an empty one is right: the unit sets it when there is no keys folder."""
    if file.is_file() and file.stat().st_size > 1:
        raise KeysError(
            f"the service's {CREDENTIAL} are a file, but must be a folder with {SECRET_NAME} and {CLIENTS_NAME}/; "
            "make it with: mgpu-launch keygen --out /etc/mgpu/INSTANCE.keys"
        )


def _load(secret: Path, listed: list[Path], check_mode: bool) -> tuple[bytes, list[bytes]]:
    check_curve()
    if len(listed) > MAX_CLIENTS:
        raise KeysError(f"{len(listed)} client keys beside {secret}; at most {MAX_CLIENTS} may connect to one server")
    own = read_keys(secret, "secret", is_secret=True, check_mode=check_mode)["secret"]
    clients = [read_keys(path, "public", is_secret=False)["public"] for path in listed]
    return own, list(dict.fromkeys(clients))
