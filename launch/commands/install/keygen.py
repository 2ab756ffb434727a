"""``mgpu-launch keygen``: make the keys with which clients connect by tcp, encrypted and authenticated."""

import os
import re
from pathlib import Path

import click

from mgpu.launch.pages.help import Command
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.server_keys import CLIENTS_NAME, PUBLIC_NAME, PUBLIC_SUFFIX, SECRET_NAME, WORKERS_NAME
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.keys import KEYS_VARIABLE, fingerprint, key_text, new_pair, read_keys

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class KeygenError(UserError):
    """The keys cannot be made as asked; nothing that existed was changed."""


@click.command(
    "keygen",
    cls=Command,
    short_help="Make keys for servers that are reached by tcp.",
    examples=(
        "mgpu-launch keygen",
        "mgpu-launch keygen --client laptop",
        "mgpu-launch keygen --worker host-b        # docs/several-hosts.md",
    ),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the keys. [default: mgpu/keys in $XDG_CONFIG_HOME or ~/.config]",
)
@click.option("--client", metavar="NAME", help="Make a client's key instead, and put it on the list of the folder.")
@click.option("--worker", metavar="NAME", help="Make the key of a host that joins with workers (serve --join).")
def keygen_command(out: Path | None, client: str | None, worker: str | None) -> None:
    """Make a server's key, or a client's, for servers that are reached by tcp.

    First `keygen` for the server, then `keygen --client NAME` for each client. Existing keys are never changed.
    """
    folder = (out or default_folder()).absolute()
    if client is not None and worker is not None:
        raise KeygenError(
            "--client and --worker are different keys: a worker sees all requests. Make one after the other"
        )
    try:
        if worker is not None:
            lines = make_worker(folder, worker)
        else:
            lines = make_server(folder) if client is None else make_client(folder, client)
    except MgpuError as error:
        raise KeygenError(str(error)) from None
    click.echo("\n".join(lines))


def default_folder() -> Path:
    """Return the folder for keys when --out names none."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mgpu" / "keys"


def make_server(folder: Path) -> list[str]:
    """Make ``server.secret`` and ``server.public``; return lines for the user. KeygenError when one exists."""
    secret_file, public_file = folder / SECRET_NAME, folder / PUBLIC_NAME
    _check_free(secret_file, f"for a client's key: mgpu-launch keygen --out {folder} --client NAME")
    _check_free(public_file, "choose another --out")
    public, secret = new_pair()
    _make_folder(folder)
    _make_folder(folder / CLIENTS_NAME)
    _write(secret_file, f"# Secret key of an mgpu server.\nsecret {key_text(secret)}\n", 0o600)
    _write(public_file, f"# Public key of an mgpu server.\npublic {key_text(public)}\n", 0o644)
    return [
        *_made(secret_file, public_file, public),
        f"  mgpu-launch keygen --out {folder} --client NAME    # for each client",
        f"  mgpu-launch serve -m MODEL --bind 'tcp://*:5555' --keys {folder}",
    ]


def make_client(folder: Path, name: str) -> list[str]:
    """Make ``NAME.client`` with the secret key and ``clients/NAME.public``; return lines for the user.

    ``folder`` must hold the server's public key: it is the server's folder, or one on the client's machine.
    """
    secret_file, made = _make_listed(folder, name, "client", CLIENTS_NAME)
    return [
        *made,
        f"  move {secret_file} to the client, readable to its owner only",
        f"  kill -HUP PID    # if the server runs: it reads {folder / CLIENTS_NAME} again",
        f"  {KEYS_VARIABLE}={name}.client mgpu-launch status --endpoint tcp://SERVER:5555    # on the client",
    ]


def make_worker(folder: Path, name: str) -> list[str]:
    """Make ``NAME.worker`` with the secret key of a host and ``workers/NAME.public``; return lines for the user."""
    secret_file, made = _make_listed(folder, name, "worker", WORKERS_NAME)
    return [
        *made,
        f"  move {secret_file} to the host, readable to its owner only",
        f"  mgpu-launch serve -m MODEL --nodes N --join tcp://ADDRESS:5570 --keys {folder}",
        f"  torchrun … -m mgpu.worker --join tcp://ADDRESS:5570 --keys {name}.worker -m MODEL    # on each host",
    ]


def _make_listed(folder: Path, name: str, kind: str, list_name: str) -> tuple[Path, list[str]]:
    """Make a key pair, and put its public key on a list of the folder. Return the secret file, and lines on both."""
    if not _NAME.fullmatch(name):
        raise KeygenError(f"{name!r} cannot name a {kind}; use letters, digits, '_', '-' and '.', such as alice")
    if not (folder / PUBLIC_NAME).exists():
        raise KeygenError(
            f"{folder / PUBLIC_NAME} is missing: make the server's key first (mgpu-launch keygen --out {folder}), or "
            f"copy {PUBLIC_NAME} from the server's keys to {folder}"
        )
    server = read_keys(folder / PUBLIC_NAME, "public", is_secret=False)["public"]
    secret_file, public_file = folder / f"{name}.{kind}", folder / list_name / f"{name}{PUBLIC_SUFFIX}"
    for file in (secret_file, public_file):
        _check_free(file, "choose another name, or remove it first")
    public, secret = new_pair()
    _make_folder(folder / list_name)
    text = f"# Secret key of the mgpu {kind} {name}, and its server's public key."
    _write(secret_file, f"{text}\nsecret {key_text(secret)}\nserver {key_text(server)}\n", 0o600)
    _write(public_file, f"# Public key of the mgpu {kind} {name}.\npublic {key_text(public)}\n", 0o644)
    return secret_file, _made(secret_file, public_file, public)


def _made(secret_file: Path, public_file: Path, public: bytes) -> list[str]:
    return [
        f"made {secret_file} (secret) and {public_file}",
        f"public key   {key_text(public)}",
        f"fingerprint  {fingerprint(public)}",
        "",
        "Next:",
    ]


def _check_free(file: Path, way_out: str) -> None:
    if os.path.lexists(file):
        raise KeygenError(f"{file} exists already and is never overwritten; {way_out}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeygenError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from None


def _write(file: Path, text: str, mode: int) -> None:
    """Create a file, with its final mode from the first moment. KeygenError when it exists."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w", encoding="ascii") as stream:
            stream.write(text)
    except OSError as error:
        raise KeygenError(f"cannot write {file}: {error.strerror}; choose another --out") from None
