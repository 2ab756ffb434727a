"""The private folder of one server: its sockets, the rendezvous file, and the file by which clients find it.

The process that holds the lock in a folder owns it. Anything may remove files under /run or /tmp, so the folder is
checked while the server runs and made again.
"""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import zmq

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.driver_files import read_records, remove_driver_files, write_record
from mgpu.protocol import discovery

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 2.0
_LONGEST_NAME = "worker-9999"
_LOCK_WAIT_S = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


class RuntimeDirError(UserError):
    """No folder can hold the server's sockets."""


class RuntimeDirFullError(RuntimeDirError):
    """The folder's file system is full, which may pass. EX_UNAVAILABLE."""

    exit_code = 69


class RuntimeDir:
    """A folder of mode 0700 with a held lock, from construction to `close`. A context manager closes it at its end."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self.base = choose_base(environ)
        sweep(self.base)
        self.path = self.base / secrets.token_hex(4)
        self._lock_fd = _made(self.path)
        self._announced: discovery.RunningServer | None = None
        self._workers: set[int] = set()
        self._check_at_s = 0.0
        self._is_missed = False

    def __enter__(self) -> "RuntimeDir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ipc(self, name: str) -> str:
        """Return the endpoint of a socket in this folder."""
        return f"ipc://{self.path / name}"

    def bind(self, socket: "zmq.Socket[bytes]", name: str) -> str:
        """Bind a socket that only this user can connect to; return its endpoint. RuntimeDirError."""
        endpoint = self.ipc(name)
        if self._is_removed():
            self._make_again()
        old_mask = os.umask(0o077)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise _error("cannot make a socket in", self.path, error) from error
        finally:
            os.umask(old_mask)
        return endpoint

    def close_socket(self, socket: "zmq.Socket[bytes]") -> None:
        """Close a socket that may be bound here, at once, and remove its file: libzmq leaves that."""
        path = str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0").removeprefix("ipc://")
        socket.close(linger=0)
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def announce(self, server: discovery.RunningServer) -> None:
        """Let clients find a ready server. RuntimeDirError when that cannot be written."""
        try:
            discovery.write_server(self.path, server)
        except OSError as error:
            raise _error("cannot write to", self.path, error) from error
        self._announced = server

    def add_worker(self, process_id: int) -> None:
        """Note a worker's process for those who clean up after it (driver_files.py)."""
        self._workers.add(process_id)
        write_record(self.path, self._workers)

    def remove_workers(self, process_ids: Collection[int]) -> None:
        """Remove what the driver has left of workers that have ended, and forget them."""
        remove_driver_files(process_ids)
        self._workers -= set(process_ids)
        write_record(self.path, self._workers)

    def restore_if_removed(self) -> None:
        """Make the folder again if something has removed it; log once if that fails. Cheap: call it often."""
        now_s = time.monotonic()
        if now_s < self._check_at_s:
            return
        self._check_at_s = now_s + CHECK_INTERVAL_S
        if not self._is_removed():
            return
        try:
            self._make_again()
        except RuntimeDirError as error:
            if not self._is_missed:
                self._is_missed = True
                log.error(
                    "something has removed %s, the folder of this server's sockets. Those who are connected are "
                    "served, but nobody else can find the server, and it ends if a worker or the gateway has to be "
                    "replaced before the folder can be made again (%s).",
                    self.path,
                    error,
                )

    def _make_again(self) -> None:
        """Make the folder and its files again, but not its sockets. RuntimeDirError."""
        problem = _problem_of(self.base)
        if problem is not None:
            raise RuntimeDirError(f"cannot make {self.path} again, which is gone: {self.base}: {problem}")
        lock_fd = _made(self.path)
        os.close(self._lock_fd)
        self._lock_fd, self._is_missed = lock_fd, False
        write_record(self.path, self._workers)
        if self._announced is not None:
            self.announce(self._announced)
        log.warning(
            "something has removed %s, the folder of this server's sockets; it is there again. If old files are "
            "cleaned up there, set %s=/short/path to another folder.",
            self.path,
            discovery.BASE_VARIABLE,
        )

    def _is_removed(self) -> bool:
        """Return whether the lock file is gone or another server's, so that the folder is no longer ours."""
        try:
            return not discovery.names_open_file(self.path / discovery.LOCK_NAME, self._lock_fd)
        except OSError:  # unknown, for example without permission: not taken for removed
            return False

    def close(self) -> None:
        """Remove the folder and all in it; a second call does nothing."""
        if self._lock_fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


def _made(path: Path) -> int:
    """Make a server's folder, or only the lock in it; return the lock's descriptor. RuntimeDirError."""
    # Locked under a hidden name, which `sweep` skips, then renamed: no other server takes it for a left-over.
    hidden, lock_fd = path.with_name(f".{path.name}"), -1
    try:
        hidden.mkdir(mode=0o700)
        lock_fd = _locked(hidden / discovery.LOCK_NAME)
        if path.is_dir():
            os.link(hidden / discovery.LOCK_NAME, path / discovery.LOCK_NAME)
            shutil.rmtree(hidden)
        else:
            hidden.rename(path)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if lock_fd >= 0:
            os.close(lock_fd)
        raise _error("cannot make a folder in", path.parent, error) from error
    return lock_fd


def _error(what: str, folder: Path, error: OSError | zmq.ZMQError) -> RuntimeDirError:
    """Return an error that says why the folder could not be used."""
    if error.errno in _FULL:
        return RuntimeDirFullError(f"{what} {folder}: its file system is full (df -hi {folder})")
    reason = "something has removed it" if error.errno == errno.ENOENT else error.strerror
    return RuntimeDirError(f"{what} {folder}: {reason}")


def choose_base(environ: Mapping[str, str] | None = None) -> Path:
    """Return the first base folder that is, or can be made, private. RuntimeDirError names what is wrong with each."""
    problems: list[str] = []
    for base in discovery.base_dirs(environ):
        problem = _problem_of(base)
        if problem is None:
            return base
        problems.append(f"{base}: {problem}")
    listed = "; ".join(problems)
    raise RuntimeDirError(
        f"no private folder for the server's sockets ({listed}). Set {discovery.BASE_VARIABLE}=/short/path"
    )


def _problem_of(base: Path) -> str | None:
    length = len(os.fsencode(base / "01234567" / _LONGEST_NAME))
    if length > discovery.IPC_PATH_MAX:
        return f"socket paths would have {length} bytes, the system allows {discovery.IPC_PATH_MAX}"
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        found = base.lstat()
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(found.st_mode):
        return "not a folder"
    if found.st_uid != os.geteuid():
        return f"owned by user {found.st_uid}, not by {os.geteuid()}"
    if found.st_mode & 0o022:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o}; chmod 700 it)"
    return None if os.access(base, os.W_OK | os.X_OK) else "not writable"


def sweep(base: Path) -> list[Path]:
    """Remove the folders of servers that no longer live, and what the driver left of their workers; return the folders.

    Nobody holds the lock of such a folder.
    """
    removed: list[Path] = []
    for folder in discovery.server_dirs(base):
        if not discovery.is_locked(folder):
            remove_driver_files(read_records(folder))
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _locked(path: Path) -> int:
    """Create and lock a file. A client that looks for servers may hold the lock for a moment, so retry."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        time.sleep(0.01)
    os.close(fd)
    raise RuntimeDirError(f"{path} stays locked by another process")
