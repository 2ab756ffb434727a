"""Let libzmq accept one connection at a time where too many at once would end the process.

libzmq (4.3.5) accepts whatever comes, in a thread of its own, and aborts the process when no descriptor is left
(ipc_listener.cpp); some hundred connections in a few milliseconds do that where the limit of open files is low. It has
no option that stops accepting. But it waits with epoll, and an entry of an epoll set can be changed by its process at
any time: with EPOLLONESHOT the kernel reports a waiting connection once, and then not before the entry is armed again.

The number of the listening descriptor comes from libzmq's monitor. The kernel lists in /proc/self/fdinfo which epoll
set has it, and with which data: libzmq keeps a pointer there, which must stay. Where this cannot be read, nothing is
changed, and only `Connections` bounds what is open.
"""

import ctypes
import os
import platform
import re
import select
from contextlib import suppress
from pathlib import Path

_ENTRY = r"^tfd:\s*{fd}\s+events:\s*[0-9a-f]+\s+data:\s*([0-9a-f]+)"
_EPOLL_CTL_MOD = 3
_MOST_TRIES = 100


class _Event(ctypes.Structure):
    _pack_ = 1 if platform.machine() == "x86_64" else 8  # as <sys/epoll.h> has it
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


class AcceptGate:
    """The listening descriptors of the front socket."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[int, int]] = {}
        """Listening descriptor: the epoll set that has it, and the data there."""
        self._unknown: dict[int, int] = {}
        """Listening descriptors that libzmq's thread has not put into its set yet, and how often that was looked up."""
        self._is_one_at_a_time = False
        self._libc = ctypes.CDLL(None, use_errno=True)

    def add(self, listener: int) -> None:
        """Take a descriptor on which libzmq is about to accept connections."""
        self._unknown[listener] = 0

    @property
    def is_complete(self) -> bool:
        return not self._unknown

    def set(self, one_at_a_time: bool) -> None:
        """Let libzmq accept one connection, until the next call, or as many as come. Cheap: call it in every turn."""
        if self._unknown:
            self._look_up()
        if one_at_a_time or self._is_one_at_a_time:
            for listener in self._entries:
                self._arm(listener, one_at_a_time)
        self._is_one_at_a_time = one_at_a_time

    def _look_up(self) -> None:
        for listener, tries in list(self._unknown.items()):
            self._unknown[listener] = tries + 1
            entry = _find_entry(listener)
            if entry is not None:
                self._entries[listener] = entry
            if entry is not None or tries >= _MOST_TRIES:
                del self._unknown[listener]

    def _arm(self, listener: int, once: bool) -> None:
        epoll, data = self._entries[listener]
        event = _Event(select.EPOLLIN | (select.EPOLLONESHOT if once else 0), data)
        self._libc.epoll_ctl(epoll, _EPOLL_CTL_MOD, listener, ctypes.byref(event))


def _find_entry(fd: int) -> tuple[int, int] | None:
    pattern = re.compile(_ENTRY.format(fd=fd), re.MULTILINE)
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if os.readlink(path) == "anon_inode:[eventpoll]":
                found = pattern.search(Path("/proc/self/fdinfo", path.name).read_text())
                if found:
                    return int(path.name), int(found[1], 16)
    return None
