"""Find connections that send a message without an end, before it has one.

libzmq collects all frames of a message out of sight, and hands them out when the last has come. Millions of empty ones
take its thread seconds to receive, and then the gateway seconds to skip, while nobody else is heard. But it can be seen
who keeps the thread busy: a connection whose bytes wait in the kernel whenever it is looked at, that libzmq wants to
read, and of which no message comes. A large message of an honest client is whole after some milliseconds of the
thread's time; a connection whose messages wait to be read by the gateway is not read by libzmq either.

Example: a client sends empty frames. The thread works on nothing else, so after every 10 ms of its time there is a look
at all connections. At the tenth that has found unread bytes, and no message since the first, the connection is ended.
libzmq drops the 400,000 frames that it has collected.
"""

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from mgpu.orchestrator.gateway.front.transport.descriptors import polled_for_input, unread_bytes
from mgpu.orchestrator.gateway.front.transport.open_connection import OpenConnection

LOOK_S = 0.01
"""Of libzmq's time between two looks."""
ENDLESS_S = 0.1
"""Of libzmq's time, in which each look has found unread bytes of a connection and no whole message has come."""
WORK_PER_LOOK = 10.0
"""With many connections a look takes long, and libzmq works this many times as long until the next."""


class EndlessMessages:
    """What the looks at all connections have found so far."""

    def __init__(
        self,
        unread: Callable[[int], int] = unread_bytes,
        polled: Callable[[Collection[int]], set[int]] = polled_for_input,
    ) -> None:
        """``unread`` tells how much of a descriptor the kernel holds; ``polled`` which ones libzmq wants to read."""
        self._unread, self._polled = unread, polled
        self._worked_s, self._next_s = 0.0, LOOK_S

    def look(self, worked_s: float, connections: Iterable[OpenConnection]) -> list[OpenConnection]:
        """Return the connections to end. Call it often: mostly it only compares ``worked_s``, libzmq's time so far."""
        since_s = worked_s - self._worked_s
        if since_s < self._next_s:
            return []
        self._worked_s, began_s = worked_s, time.perf_counter()
        since_s = min(since_s, 2 * LOOK_S)  # one look sees one moment, however much has happened
        found = [each for each in connections if self._has_gone_on(each, since_s)]
        wanted = self._polled({each.fd for each in found}) if found else set()
        for each in found:
            each.endless_s = 0.0
        self._next_s = max(LOOK_S, WORK_PER_LOOK * (time.perf_counter() - began_s))
        return [each for each in found if each.fd in wanted]

    def _has_gone_on(self, connection: OpenConnection, since_s: float) -> bool:
        if connection.is_heard:
            connection.is_heard, connection.endless_s = False, 0.0
            return False
        with suppress(OSError):  # libzmq has closed it
            if self._unread(connection.fd):
                connection.endless_s += since_s
        return connection.endless_s >= ENDLESS_S
