"""Find connections that send more than is read, and nothing that has an answer.

What a connection has sent and libzmq has not read lies in the kernel, on tcp also in the kernel of the sender, some
megabytes of short messages. That stays when the sender ends, and cannot be told from a sender that waits: the end of
the stream comes behind it. Only an answer would tell, because the kernel of a sender that has gone refuses it. But some
messages have none, such as the cancellation of a request that does not exist. A flood is read at the pace of its
owner's share, so what a dead one has left behind would keep its descriptor for minutes, and take a part of that pace.
So a connection is ended of which

- each look for `FLOOD_S` has found unread bytes, and
- `FLOOD_MESSAGES` were read in that time, while nothing was sent to it.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from mgpu.orchestrator.gateway.front.transport.descriptors import unread_bytes
from mgpu.orchestrator.gateway.front.transport.open_connection import OpenConnection

LOOK_S = 1.0
FLOOD_S, FLOOD_MESSAGES = 5.0, 300


class Floods:
    """What the looks at all connections have found so far."""

    def __init__(
        self, unread: Callable[[int], int] = unread_bytes, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """``unread`` tells how much of a descriptor the kernel holds."""
        self._unread, self._clock_s = unread, clock_s
        self._next_s = 0.0

    def look(self, connections: Iterable[OpenConnection]) -> list[OpenConnection]:
        """Return the connections to end. Call it often: mostly it only looks at the clock."""
        now_s = self._clock_s()
        if now_s < self._next_s:
            return []
        self._next_s = now_s + LOOK_S
        return [each for each in connections if self._is_flood(each, now_s)]

    def _is_flood(self, connection: OpenConnection, now_s: float) -> bool:
        num_unread = 0
        if connection.num_heard and not connection.is_answered:
            with suppress(OSError):  # libzmq has closed it
                num_unread = self._unread(connection.fd)
        if not num_unread:
            connection.num_heard, connection.is_answered, connection.behind_since_s = 0, False, now_s
        behind_since_s = max(connection.behind_since_s, connection.since_s)
        return now_s - behind_since_s >= FLOOD_S and connection.num_heard >= FLOOD_MESSAGES
