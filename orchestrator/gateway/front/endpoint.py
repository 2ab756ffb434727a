"""Bind the front channel where this is safe: a private ipc socket, TCP on the loopback, or TCP with keys."""

import contextlib
import errno
import fcntl
import importlib.util
import ipaddress
import os
from pathlib import Path
from typing import Any

import zmq

from mgpu.orchestrator.errors import UserError
from mgpu.protocol.discovery import IPC_PATH_MAX, names_open_file

MAX_PORT = 65535
_LOCK_TRIES = 100
"""Each try fails because another server has just ended. That so many do means that something removes the file."""


class BindError(UserError):
    """The front endpoint cannot be bound; the text says what to use instead."""


class EndpointInUse(BindError):
    """Another program has the endpoint. It may end, so this is no mistake of the configuration."""

    exit_code = 1


def try_endpoint(endpoint: str, has_keys: bool = False) -> None:
    """Bind an endpoint for a moment. BindError says before anything is started what the gateway would meet later."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        bound, lock = bind(socket, endpoint, has_keys)
    release(bound, lock)


def bind(socket: "zmq.Socket[Any]", endpoint: str, has_keys: bool = False) -> tuple[str, int]:
    """Bind ``socket``; return the endpoint for clients (a TCP port 0 is resolved) and the lock of an ipc path, else -1.

    The lock is an open file descriptor; the endpoint is ours as long as it stays open (see `release`).
    """
    check_endpoint(endpoint, has_keys)
    if endpoint.startswith("ipc://"):
        lock = _lock_ipc(endpoint.removeprefix("ipc://"))
        old_mask = os.umask(0o077)
        try:
            _bind(socket, endpoint)
        except BindError:
            os.close(lock)
            raise
        finally:
            os.umask(old_mask)
        return endpoint, lock
    _bind(socket, endpoint)
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0"), -1


def is_lost(endpoint: str, lock: int) -> bool:
    """Return whether an ipc endpoint's files have been removed, so that nobody can connect any more."""
    if not endpoint.startswith("ipc://"):
        return False
    path = endpoint.removeprefix("ipc://")
    try:
        return lock < 0 or not (names_open_file(f"{path}.lock", lock) and Path(path).is_socket())
    except OSError:  # the files cannot be looked at just now
        return False


def release(endpoint: str, lock: int) -> None:
    """Remove an ipc endpoint's socket file and lock; call it when the socket is closed."""
    if lock < 0:
        return
    path = endpoint.removeprefix("ipc://")
    for leftover in (path, f"{path}.lock"):
        with contextlib.suppress(OSError):
            os.unlink(leftover)
    os.close(lock)


def check_endpoint(endpoint: str, has_keys: bool = False) -> None:
    """Raise BindError, which says what to use instead, for an endpoint that cannot be bound, or not safely."""
    if endpoint.startswith("tcp://"):
        _check_tcp(endpoint, has_keys)
    elif endpoint.startswith("ipc://"):
        _check_ipc(endpoint.removeprefix("ipc://"))
    else:
        raise BindError(f"cannot bind {endpoint!r}: use ipc:///path/to/socket or tcp://127.0.0.1:PORT")


def _bind(socket: "zmq.Socket[Any]", endpoint: str) -> None:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        reason, way_out = error.strerror, "choose another --bind"
        if error.errno == errno.EADDRINUSE:
            raise EndpointInUse(f"cannot bind {endpoint}: {_holder(endpoint)} is listening there; {way_out}") from None
        if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
            reason, way_out = "this machine has no such address", "see `ip address`"
        raise BindError(f"cannot bind {endpoint}: {reason}; {way_out}") from None


def _holder(endpoint: str) -> str:
    """Describe the program that has a port; without psutil, and on ipc, it is not known."""
    port = endpoint.rpartition(":")[2]
    if not endpoint.startswith("tcp://") or not port.isdecimal() or importlib.util.find_spec("psutil") is None:
        return "another program"
    from mgpu.orchestrator.host.port_holder import port_holder

    return port_holder(int(port))


def _check_ipc(path: str) -> None:
    size = len(os.fsencode(path))
    if not path.startswith("/"):
        raise BindError(f"cannot bind ipc://{path}: the path must be absolute, such as ipc:///run/mgpu/front.sock")
    if size > IPC_PATH_MAX:
        raise BindError(f"the socket path {path} has {size} bytes, the system allows {IPC_PATH_MAX}; use a shorter one")
    if not Path(path).parent.is_dir():
        raise BindError(f"cannot bind ipc://{path}: the folder {Path(path).parent} does not exist")
    if os.path.lexists(path) and not Path(path).is_socket():
        raise BindError(f"cannot bind ipc://{path}: a file that is not a socket is there already")


def _lock_ipc(path: str) -> int:
    """Take the lock beside a socket file: libzmq would silently let a second server steal an ipc endpoint in use."""
    for _ in range(_LOCK_TRIES):
        try:
            lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BindError(f"cannot bind ipc://{path}: {path}.lock: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise EndpointInUse(f"another server is listening on ipc://{path}; choose another --bind") from None
        if names_open_file(path + ".lock", lock):
            return lock
        os.close(lock)  # its owner has just removed it (see `release`): a file without a name locks nobody out
    raise BindError(f"cannot bind ipc://{path}: {path}.lock was removed {_LOCK_TRIES} times; choose another --bind")


def _check_tcp(endpoint: str, has_keys: bool) -> None:
    written, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    host = written.strip("[]")
    if ":" in host and written != f"[{host}]":
        raise BindError(f"cannot bind {endpoint}: write an IPv6 address in brackets, such as tcp://[{host}]:{port}")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise BindError(f"cannot bind {endpoint}: write tcp://127.0.0.1:PORT with a port from 0 (any) to {MAX_PORT}")
    address = _address(host)
    if host == "localhost":
        raise BindError(f"cannot bind {endpoint}: write the address, tcp://127.0.0.1:{port}")
    if not has_keys and not (address is not None and address.is_loopback):
        raise BindError(
            f"refusing to bind {endpoint}: without keys nothing is encrypted and anyone could connect, so tcp is for "
            "the loopback only. Make keys with `mgpu-launch keygen --out DIR` and add --keys DIR, or use "
            "tcp://127.0.0.1:PORT"
        )
    if address is None and host != "*":
        raise BindError(f"cannot bind {endpoint}: {host!r} is no address; write one, or tcp://*:{port} for all of them")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
