"""Bound what has arrived and nobody has taken, in a process that passes on the answers of many readers.

Such a process reads its connection as fast as it can, because all requests share it: one reader that takes little must
not hold up the others. So pieces for that reader gather here. Beyond a bound its answer fails with `slow_reader`, its
pieces are dropped and its request is cancelled. Past the bound of all, this meets the one with most.

Only what comes while a reader is busy counts. One that waits takes what a burst brings as soon as the burst is over.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mgpu.protocol.client.requests.answer import Answer
from mgpu.protocol.errors import RequestFailed


@dataclass(frozen=True, slots=True)
class UnreadBounds:
    """In bytes of this process's memory, about ten times those on the wire with log-probabilities, else four times."""

    one: int = 16 << 20
    all: int = 256 << 20
    portion: int = 16 << 10
    """What a reader takes at once, or one larger piece: while it is sent, it counts no more."""


class Backlogs:
    """Counts the unread pieces of all streams of one client."""

    def __init__(self, bounds: UnreadBounds, cancel: Callable[[int], None]) -> None:
        """``cancel`` ends the request with this id, if it is in flight. It is called while messages are read."""
        self.bounds = bounds
        self._cancel = cancel
        self._unread: dict[int, tuple[Answer, int]] = {}
        self._total = 0

    def note(self, request_id: int, answer: Answer) -> None:
        """Count what has come for a stream. Beyond a bound, end the one with most."""
        if answer.is_awaited:
            return
        self.count(request_id, answer)
        if answer.unread_bytes > self.bounds.one:
            self._end(request_id, self.bounds.one, "one answer")
        elif self._total > self.bounds.all:
            largest = max(self._unread, key=lambda each: self._unread[each][1])
            self._end(largest, self.bounds.all, "all answers together")

    def count(self, request_id: int, answer: Answer) -> None:
        """Count what a stream has now."""
        self.forget(request_id)
        if answer.unread_bytes:
            self._unread[request_id] = answer, answer.unread_bytes
            self._total += answer.unread_bytes

    def forget(self, request_id: int) -> None:
        """Count a stream no more."""
        if (found := self._unread.pop(request_id, None)) is not None:
            self._total -= found[1]

    def _end(self, request_id: int, limit: int, whose: str) -> None:
        answer, unread_bytes = self._unread[request_id]
        text = f"the answer was not read fast enough: {unread_bytes} bytes waited for its reader"
        self.forget(request_id)
        answer.discard(RequestFailed("slow_reader", f"{text}; {whose} may have {limit}"))
        self._cancel(request_id)
