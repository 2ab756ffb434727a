"""What the kernel knows of a connection that libzmq has accepted, and how to end it, by the number of its descriptor.

libzmq reads, writes and closes these descriptors in its own thread, at any time. Looking at one is safe; what is seen
may be of another file by then, so `Ender` compares the inode of the socket before it ends anything.
"""

import fcntl
import os
import re
import select
import socket
import struct
import sys
import termios
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROCESS = "pid:"
"""How the origin of an ipc connection begins."""
_CREDENTIALS = struct.Struct("iII")
_EPOLL_ENTRY = re.compile(r"^tfd:\s*(\d+)\s+events:\s*([0-9a-f]+)", re.MULTILINE)
_RECEIVED = slice(128, 136)
"""tcpi_bytes_received in <linux/tcp.h>"""


def inode_and_origin(fd: int) -> tuple[int, str]:
    """Return the inode of a connection's socket, and whose it is: ``pid:N`` or an address. OSError when it is gone."""
    inode = os.fstat(fd).st_ino
    with _borrowed(fd) as connection:
        if connection.family == socket.AF_UNIX:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return inode, f"{PROCESS}{_CREDENTIALS.unpack(credentials)[0]}"
        return inode, str(connection.getpeername()[0])


def unread_bytes(fd: int) -> int:
    """Return how many bytes of a connection the kernel holds because libzmq has not read them. OSError."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def received_bytes(fd: int) -> int:
    """Return how many bytes have come over a tcp connection so far; 0 for ipc. OSError."""
    with _borrowed(fd) as connection:
        if connection.family == socket.AF_UNIX:
            return 0
        return int.from_bytes(
            connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.stop)[_RECEIVED], sys.byteorder
        )


def has_left(fd: int) -> bool:
    """Return whether the peer of a connection has closed it; libzmq may not know, if it has much of it to hand out."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))


def polled_for_input(fds: Collection[int]) -> set[int]:
    """Return which of these descriptors an epoll set of this process waits for, to be read. It takes a millisecond."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if os.readlink(path) == "anon_inode:[eventpoll]":
                entries = _EPOLL_ENTRY.findall(Path("/proc/self/fdinfo", path.name).read_text())
                found |= {int(fd) for fd, events in entries if int(events, 16) & select.EPOLLIN}
    return found.intersection(fds)


class Ender:
    """Ends connections, also when no further descriptor can be opened."""

    def __init__(self) -> None:
        self._null, self._spare = (os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(2))

    def end(self, fd: int, inode: int) -> None:
        """Shut down the connection, unless libzmq has closed it. libzmq sees the end of the stream and closes it."""
        with suppress(OSError):
            os.dup2(fd, self._spare, inheritable=False)  # this number cannot pass to another file meanwhile
            if os.fstat(self._spare).st_ino == inode:
                with _borrowed(self._spare) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
        os.dup2(self._null, self._spare, inheritable=False)

    def close(self) -> None:
        os.close(self._null)
        os.close(self._spare)


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """Use a descriptor as a socket without closing it. OSError if it is none."""
    connection = socket.socket(fileno=fd)
    try:
        yield connection
    finally:
        connection.detach()
