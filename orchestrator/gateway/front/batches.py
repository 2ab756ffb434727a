"""Messages for clients that read several at once: kept until the end of a turn, and sent as one.

What a message of two frames costs libzmq and pyzmq on both sides is paid once for all that a turn brings.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from mgpu.protocol.front.framing import batch_of

MAX_BYTES = 256 << 10
"""Of one batch. As each array or map has a byte at least, it has no more of them than a message may have."""
MAX_MESSAGES = 1024


@dataclass(slots=True)
class _Batch:
    bodies: list[bytes] = field(default_factory=list)
    size: int = 0


class Batches:
    """What this turn has for each connection."""

    def __init__(self, send: Callable[[bytes, bytes], None]) -> None:
        """``send`` takes a connection and a body."""
        self._send = send
        self._batches: dict[bytes, _Batch] = {}

    def add(self, connection: bytes, body: bytes) -> None:
        """Keep a message until `send`; sooner if the batch is full with it."""
        batch = self._batches.get(connection)
        if batch is None:
            batch = self._batches[connection] = _Batch()
        elif batch.size + len(body) > MAX_BYTES or len(batch.bodies) >= MAX_MESSAGES:
            self._send(connection, batch_of(batch.bodies))
            batch.bodies, batch.size = [], 0
        batch.bodies.append(body)
        batch.size += len(body)

    def send(self) -> None:
        """Send everything."""
        if self._batches:
            batches, self._batches = self._batches, {}
            for connection, batch in batches.items():
                self._send(connection, batch_of(batch.bodies))

    def drop(self, connection: bytes) -> None:
        """Throw away what waits for a connection."""
        self._batches.pop(connection, None)
