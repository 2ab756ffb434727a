"""Bound the bytes of unread answers that lie in libzmq's pipes, which bound their number alone.

libzmq does not tell how much of a pipe it has sent. The kernel tells whether bytes of a connection wait there for a
peer that does not take them. So bytes are counted as they are handed to libzmq, and when they have become many the
kernel is asked: if nothing waits, the peer reads, and the count begins again. What was handed over a moment ago may not
be in the kernel yet, so that counts only when libzmq's thread has done what it was told until then (`io_threads.py`).

Example: a client asks for texts of 1 MiB and reads none of them. The first fills the kernel's buffer and the pipe. The
second finds bytes waiting and stays with the gateway, which gives the connection up when 4 MiB wait.
"""

import fcntl
import struct
import termios
from collections.abc import Callable

from mgpu.orchestrator.gateway.front.transport.descriptors import PROCESS
from mgpu.orchestrator.gateway.front.transport.io_threads import IoThreads
from mgpu.orchestrator.gateway.front.transport.open_connection import OpenConnection

FREE_BYTES = 64 << 10
"""Of one connection, for which the kernel is not asked."""
ASK_BYTES = 16 << 10
"""More that a connection is handed before the kernel is asked again: asking takes longer than sending a token."""
MAX_BYTES = 1 << 20
"""Of one connection that does not read. A single message may be longer."""
MAX_TOTAL_BYTES = 64 << 20
"""Of all; beyond it each connection that does not read has `FREE_BYTES`."""
_SIOCOUTQNSD = 0x894B
"""<linux/sockios.h>: bytes of a tcp connection that were not even sent, because the peer's buffers are full."""


class PipeRoom:
    """What all connections have been handed."""

    def __init__(
        self, unsent_bytes: Callable[[OpenConnection], int] | None = None, threads: IoThreads | None = None
    ) -> None:
        self._unsent_bytes = unsent_bytes or unsent_bytes_of
        self._threads = threads or IoThreads()
        self._total = 0

    def take(self, connection: OpenConnection, nbytes: int) -> bool:
        """Count so many bytes more for a connection; False if it has to read first. An idle one may have any number."""
        held = connection.piped_bytes + nbytes
        if held > FREE_BYTES:
            is_too_much = held > (MAX_BYTES if self._total < MAX_TOTAL_BYTES else FREE_BYTES)
            if connection.piped_bytes and (is_too_much or held >= connection.ask_at_bytes):
                if self._has_taken_all(connection):
                    held = nbytes
                elif is_too_much:
                    return False
                connection.ask_at_bytes = held + ASK_BYTES
            connection.piped_at_s = self._threads.worked_s()
        self._total += held - connection.piped_bytes
        connection.piped_bytes, connection.is_answered = held, True
        return True

    def _has_taken_all(self, connection: OpenConnection) -> bool:
        return self._unsent_bytes(connection) == 0 and self._threads.have_caught_up(connection.piped_at_s)

    def give_back(self, connection: OpenConnection, nbytes: int) -> None:
        """Take back what `take` counted last, because libzmq did not accept it."""
        self._total -= nbytes
        connection.piped_bytes -= nbytes

    def free(self, connection: OpenConnection) -> None:
        """Note that a connection has ended."""
        self._total -= connection.piped_bytes
        connection.piped_bytes = 0


def unsent_bytes_of(connection: OpenConnection) -> int:
    """Return how many bytes the kernel holds because the peer does not take them; 0 for a connection that is gone."""
    request = termios.TIOCOUTQ if connection.origin.startswith(PROCESS) else _SIOCOUTQNSD
    try:
        [found] = struct.unpack("=i", fcntl.ioctl(connection.fd, request, bytes(4)))
    except OSError:  # libzmq has closed it
        return 0
    return int(found)
