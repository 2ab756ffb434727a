"""Find the servers that run on this machine, by the files in their runtime directories.

Every server owns a folder of mode 0700 with a random name below a base folder. It holds ``lock``, which the server
keeps locked while it lives, its ipc sockets, and ``server.json``, written when it is ready.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mgpu.protocol.errors import ServerUnreachable

LOCK_NAME = "lock"
COPY_FOLDER = "copy"
"""Begins the name of the folder for the runtime directory of a copy, in that of its router."""
INFO_NAME = "server.json"
SERVER_DIR_PATTERN = re.compile(r"[0-9a-f]{8}")
BASE_VARIABLE = "MGPU_RUNTIME_DIR"
ENDPOINT_VARIABLE = "MGPU_ENDPOINT"
START_HINT = "start one with: mgpu-launch serve -m MODEL"
IPC_PATH_MAX = 107
"""Longest path of a unix socket, in bytes (sockaddr_un)."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """What a client must know to use a server: the content of its ``server.json``."""

    endpoint: str
    pid: int
    model: str
    version: str
    http: str = ""
    """URL of the HTTP server; empty if there is none."""


def base_dirs(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Return the folders that may hold servers' runtime directories, the preferred first; they need not exist.

    ``MGPU_RUNTIME_DIR`` alone if it is set; else systemd's ``RUNTIME_DIRECTORY``, ``$XDG_RUNTIME_DIR/mgpu``,
    ``/run/mgpu`` and ``mgpu-<uid>`` in each folder for temporary files. All are absolute.
    """
    environ = os.environ if environ is None else environ
    if explicit := environ.get(BASE_VARIABLE):
        return [Path(explicit).absolute()]
    bases = [Path(part) for part in environ.get("RUNTIME_DIRECTORY", "").split(":") if part]
    if session := environ.get("XDG_RUNTIME_DIR"):
        bases.append(Path(session) / "mgpu")
    # Not tempfile.gettempdir(): it writes a file to try each folder, and a client needs no folder that it can write to.
    temporary = [environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")] + ["/tmp", "/var/tmp"]
    bases.append(Path("/run/mgpu"))
    bases.extend(Path(folder) / f"mgpu-{os.geteuid()}" for folder in temporary if folder)
    return [base.absolute() for base in dict.fromkeys(bases)]


def find_endpoint(endpoint: str | None) -> str:
    """Return the endpoint to use: the argument, else MGPU_ENDPOINT, else that of the only running server.

    Either may also be the name of a model that a server here serves. ServerUnreachable when no server runs, or when
    several run and none was named.
    """
    endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE)
    if endpoint and "://" in endpoint:
        return endpoint
    servers = running_servers()
    if endpoint:
        return _serving(endpoint, servers)
    if not servers:
        looked = ", ".join(str(base) for base in base_dirs())
        raise ServerUnreachable(
            f"no mgpu server is running here (looked in {looked}); {START_HINT}. For a server with another TMPDIR or "
            f"{BASE_VARIABLE}, set the same here, or set {ENDPOINT_VARIABLE}"
        )
    if len(servers) > 1:
        listed = ", ".join(f"{server.endpoint} ({server.model})" for server in servers)
        raise ServerUnreachable(
            f"several mgpu servers are running: {listed}; choose one by its endpoint or its model, with --endpoint or "
            f"{ENDPOINT_VARIABLE}"
        )
    return servers[0].endpoint


class ServerFinder:
    """Finds the endpoint once, and again when that server has ended: each start has another runtime directory."""

    def __init__(self, named: str | None) -> None:
        """``named`` is what `find_endpoint` takes. Nothing is looked for yet. ServerUnreachable if it is no text."""
        if named is not None and not isinstance(named, str):
            raise ServerUnreachable(
                f"an endpoint is text, such as tcp://127.0.0.1:5555 or ipc:///path, not {type(named).__name__}"
            )
        self.found: str | None = None
        self.named = named

    def endpoint(self) -> str:
        """Return the endpoint to use. Raises what `find_endpoint` does. An endpoint that was named stays."""
        if self.found is None or self._has_ended(self.found):
            self.found = find_endpoint(self.named)
        return self.found

    def _has_ended(self, found: str) -> bool:
        if found.startswith("ipc://"):
            return server_has_ended(found)
        if "://" in (self.named or os.environ.get(ENDPOINT_VARIABLE, "")):
            return False
        servers = running_servers()  # empty also where this process may not see the server's folder
        return bool(servers) and found not in [server.endpoint for server in servers]


def _serving(model: str, servers: list[RunningServer]) -> str:
    """Return the endpoint of the only server with that model."""
    found = [server.endpoint for server in servers if server.model == model]
    if len(found) == 1:
        return found[0]
    if found:
        raise ServerUnreachable(f"several servers here serve {model!r}: {', '.join(found)}; choose one by its endpoint")
    known = f"running: {', '.join(server.model for server in servers)}" if servers else "no server is running"
    raise ServerUnreachable(
        f"{model!r} is no endpoint, such as tcp://127.0.0.1:5555 or ipc:///path, and no model of a server here "
        f"({known})"
    )


def running_servers(environ: Mapping[str, str] | None = None) -> list[RunningServer]:
    """Return the servers that are ready and whose folder this user can read, the most recent first.

    Only folders of this user or of root are trusted.
    """
    found: list[tuple[float, RunningServer]] = []
    for base in base_dirs(environ):
        for folder in server_dirs(base):
            with contextlib.suppress(OSError):  # a server that ends may remove it at any time
                server = _read_server(folder)
                if server is not None and is_locked(folder):
                    found.append(((folder / INFO_NAME).stat().st_mtime, server))
    return [server for _, server in sorted(found, key=lambda item: -item[0])]


def server_dirs(base: Path) -> list[Path]:
    """Return the runtime directories below a base that this user or root owns; none if the base cannot be read."""
    owners = (0, os.geteuid())
    with contextlib.suppress(OSError):
        folders = [entry for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False)]
        named = [folder for folder in folders if SERVER_DIR_PATTERN.fullmatch(folder.name)]
        return [Path(folder) for folder in named if folder.stat(follow_symlinks=False).st_uid in owners]
    return []


def is_locked(folder: Path) -> bool:
    """Return True if the server that made this folder still lives: the kernel drops its lock with the process."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def server_has_ended(endpoint: str) -> bool:
    """Return True if the server behind an ipc endpoint has ended: its folder is gone, or its lock is free."""
    if not endpoint.startswith("ipc://"):
        return False
    folder = Path(endpoint.removeprefix("ipc://")).parent
    try:
        return not folder.is_dir() or ((folder / LOCK_NAME).exists() and not is_locked(folder))
    except PermissionError:  # the folder of another user
        return False


def names_open_file(path: str | Path, fd: int) -> bool:
    """Return True if ``path`` still names the open file. OSError when that cannot be determined."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return False


def write_server(folder: Path, server: RunningServer) -> None:
    """Write ``server.json``, in one step, so that readers never see half a file."""
    partial = folder / f".{INFO_NAME}"
    partial.write_text(json.dumps(asdict(server)), encoding="utf-8")
    partial.replace(folder / INFO_NAME)


def _read_server(folder: Path) -> RunningServer | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / INFO_NAME).read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("pid"), int):
            texts = [found.get(name) for name in ("endpoint", "model", "version")]
            if all(isinstance(text, str) for text in texts):
                http = str(found.get("http") or "")
                return RunningServer(found["endpoint"], found["pid"], found["model"], found["version"], http)
    return None
