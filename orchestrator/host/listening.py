"""The listening socket of the HTTP server: read `--http`, bind before anything is loaded, say who has a taken port.

The parent owns the socket, so that nobody is refused while one HTTP process replaces another: connections wait.
"""

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.port_holder import port_holder, process_text

NONE = "none"
UNIX_PREFIX = "unix:"
UNIX_PATH_MAX = 107
MAX_PORT = 65535
BACKLOG = 2048
_PORTS_TO_TRY = 100


class HttpAddressError(UserError):
    """``--http`` names no address that can be used; the text says what to write."""


class HttpAddressTaken(HttpAddressError):
    """Another program listens there. It may end, so this is no mistake of the configuration."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Where to listen: a TCP address and port, or the path of a unix socket."""

    host: str
    """Empty for a unix socket."""
    port: int
    path: str
    is_encrypted: bool = False

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can connect."""
        return bool(self.path) or self.is_loopback_port

    @property
    def is_loopback_port(self) -> bool:
        """True for a port that programs of this machine can reach, browsers among them. No unix socket is one."""
        return not self.path and ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"{UNIX_PREFIX}{self.path}" if self.path else _joined(self.host, self.port)


@dataclass(frozen=True, slots=True)
class HttpListener:
    """A socket that listens. ``url`` is what clients use."""

    socket: socket.socket
    address: HttpAddress
    url: str
    inode: int = field(default=0, compare=False)
    """Of the file of a unix socket: another program may put its own there."""

    def remove_file(self) -> None:
        """Remove the file of a unix socket, unless it is another program's by now. A second call does nothing."""
        remove_file(self.address.path, self.inode)


def parse_address(text: str) -> HttpAddress | None:
    """Read ADDRESS:PORT, PORT, ``unix:/path`` or ``none``. HttpAddressError says what to write instead."""
    if text == NONE:
        return None
    if text.startswith(UNIX_PREFIX):
        return HttpAddress("", 0, _checked_path(text.removeprefix(UNIX_PREFIX)))
    written, _, port = text.removeprefix("http://").rstrip("/").rpartition(":")
    host = written.strip("[]").replace("localhost", "127.0.0.1") or "127.0.0.1"
    if ":" in host and written != f"[{host}]":
        raise HttpAddressError(f"--http {text}: write an IPv6 address in brackets, such as [{host}]:8000")
    if not port.isascii() or not port.isdecimal() or int(port) > MAX_PORT:
        raise HttpAddressError(
            f"--http {text}: write ADDRESS:PORT with a port from 0 (any) to {MAX_PORT}, such as 127.0.0.1:8000, "
            "unix:/path/to/socket, or none"
        )
    if host == "*":
        host = "0.0.0.0"
    try:
        return HttpAddress(str(ipaddress.ip_address(host)), int(port), "")
    except ValueError:
        raise HttpAddressError(
            f"--http {text}: {host!r} is no address; write one of this machine's (`ip address` lists them), 127.0.0.1, "
            "or 0.0.0.0 for all of them"
        ) from None


def _checked_path(path: str) -> str:
    size = len(os.fsencode(path))
    if not path.startswith("/"):
        raise HttpAddressError(f"--http unix:{path}: the path must be absolute, such as unix:/run/mgpu/http.sock")
    if size > UNIX_PATH_MAX:
        raise HttpAddressError(f"--http: the path has {size} bytes, the system allows {UNIX_PATH_MAX}: {path}")
    return path


def check_address(address: HttpAddress) -> None:
    """Raise HttpAddressError if nothing can ever listen there on this machine, whoever has the address now."""
    if address.path:
        os.close(_opened_folder(address))
        return
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
        try:
            probe.bind((address.host, 0))
        except OSError as error:
            raise _tcp_error(address, error) from None


@contextlib.contextmanager
def listening(address: HttpAddress | None, for_all_users: bool = False) -> Iterator[HttpListener | None]:
    """Listen on ``address`` inside the block; remove the file of a unix socket at its end. HttpAddressError.

    ``for_all_users``: other users of this machine may connect to a unix socket.
    """
    if address is None:
        yield None
        return
    opened = _listen_unix(address, for_all_users) if address.path else _listen_tcp(address)
    with opened.socket as socket_:
        try:
            yield opened
        finally:
            opened.remove_file()
            socket_.close()


def remove_file(path: str, inode: int = 0) -> None:
    """Remove the file of a unix socket, unless another program has put its own there."""
    if path:
        with contextlib.suppress(OSError):
            if not inode or os.stat(path, follow_symlinks=False).st_ino == inode:
                os.unlink(path)


def _listen_tcp(address: HttpAddress) -> HttpListener:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    socket_ = socket.socket(family, socket.SOCK_STREAM)
    socket_.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        socket_.bind((address.host, address.port))
        socket_.listen(BACKLOG)
    except OSError as error:
        socket_.close()
        raise _tcp_error(address, error) from None
    port = socket_.getsockname()[1]
    scheme = "https" if address.is_encrypted else "http"
    return HttpListener(socket_, replace(address, port=port), f"{scheme}://{_joined(address.host, port)}")


def _tcp_error(address: HttpAddress, error: OSError) -> HttpAddressError:
    if error.errno == errno.EADDRINUSE:
        free = _free_port(address)
        other = f"--http {_joined(address.host, free)} for another port, " if free else ""
        return HttpAddressTaken(
            f"HTTP cannot listen on {address}: {port_holder(address.port)} has it. Type {other}--http none to serve "
            "without HTTP"
        )
    reason = error.strerror
    if error.errno == errno.EACCES:
        reason = f"ports below 1024 need root; use --http {_joined(address.host, 8000)} behind a proxy"
    elif error.errno == errno.EADDRNOTAVAIL:
        reason = "this machine has no such address (`ip address` lists them)"
    return HttpAddressError(f"HTTP cannot listen on {address}: {reason}")


def _free_port(address: HttpAddress) -> int:
    """Return the next port that nobody has, 0 if there is none near."""
    for port in range(address.port + 1, min(address.port + _PORTS_TO_TRY, MAX_PORT)):
        with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((address.host, port))
                probe.listen(1)
                return port
    return 0


def _listen_unix(address: HttpAddress, for_all_users: bool) -> HttpListener:
    """Bind a path. The file of a server that was killed is replaced; one that is in use, or no socket, is not."""
    folder = _opened_folder(address)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two servers that start together must not remove each other's file
        _remove_stale(address)
        return _bound_unix(address, for_all_users)
    finally:
        os.close(folder)


def _opened_folder(address: HttpAddress) -> int:
    folder = Path(address.path).parent
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HttpAddressError(f"HTTP cannot listen on {address}: {folder}: {error.strerror}") from None


def _bound_unix(address: HttpAddress, for_all_users: bool) -> HttpListener:
    socket_ = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o111 if for_all_users else 0o177)
    try:
        socket_.bind(address.path)
        socket_.listen(BACKLOG)
    except OSError as error:
        socket_.close()
        raise HttpAddressError(f"HTTP cannot listen on {address}: {error.strerror}") from None
    finally:
        os.umask(old_mask)
    return HttpListener(socket_, address, str(address), os.stat(address.path).st_ino)


def _remove_stale(address: HttpAddress) -> None:
    try:
        mode = os.stat(address.path, follow_symlinks=False).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise HttpAddressError(f"HTTP cannot listen on {address}: a file that is no socket is there; choose another")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            remove_file(address.path)
            return
        except OSError as error:
            reason = error.strerror or str(error)
            raise HttpAddressError(f"HTTP cannot listen on {address}: {reason}; choose another path") from None
        pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    raise HttpAddressTaken(
        f"HTTP cannot listen on {address}: {process_text(pid)} has it. Type another path, or --http none to serve "
        "without HTTP"
    )


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
