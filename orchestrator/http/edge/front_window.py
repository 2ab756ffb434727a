"""Which requests are sent on to the gateway next: few at a time that it has not read, of all owners in turn.

Theory. All of HTTP is one connection to the gateway, which reads it in order and gives it one owner's part of its time.
So whoever puts a thousand requests into that line and leaves would have everybody else wait behind them. Here a message
waits for one of `SIZE` places instead, and keeps it until the gateway says anything about it: accepted, refused or,
after a second, that it still waits. From then on it is in the gateway's own line, where each owner whom this process
names has turns of its own. An owner, an API key or an address, may have as many places as are free: one alone has half
of them, two a third each. So there is always one for a newcomer. A request whose client leaves while it waits here is
never sent. One that was sent keeps its place until the gateway has ended it.

Example: A submits 1000 requests and closes all connections. 16 were sent, with the cancels behind them. B comes, is
sent at once, and waits for what the gateway needs for these 32 messages. The other 984 are gone.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from mgpu.orchestrator.gateway.front.fair_turns import FairTurns, Path
from mgpu.protocol.errors import RequestFailed

SIZE = 32
"""Twice what one owner needs to keep the gateway busy. Their messages and cancels are less than it reads ahead."""
MOST_WAITING = 4096
"""Of one owner: more than may run and wait at the gateway."""
MOST_BYTES, MOST_TOTAL_BYTES = 64 << 20, 256 << 20
"""Bodies of those that wait, of one owner and of all."""
LONGEST_WAIT_S = 15.0
FORGET_S = 20.0
"""The gateway says something about each request once a second. What it has said nothing about for so long is lost."""
RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class Whose:
    """Whose the request is that a task works on."""

    path: Path
    """Owner, a key or an address, and its connection."""
    body_bytes: int = 0


WHOSE: ContextVar[Whose] = ContextVar("WHOSE")

_Waiting = tuple[int, "asyncio.Future[None]"]


class FrontWindow:
    """The places, who has them, and who waits for one. The `Window` of this process's client."""

    def __init__(self, size: int = SIZE, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._clock_s = clock_s
        self._unread: dict[int, tuple[str, float]] = {}
        """Owner and time of each message that was let in and not heard of, the oldest first."""
        self._places: Counter[str] = Counter()
        """Of each owner."""
        self._waiting: Counter[str] = Counter()
        self._line: FairTurns[_Waiting] = FairTurns()

    async def enter(self, message_id: int, longest_s: float) -> None:
        """Return when a message may be sent. RequestFailed `overloaded` if too much waits, or for too long."""
        whose = WHOSE.get(None) or Whose(("", ""))
        path, nbytes, whose.body_bytes = whose.path, whose.body_bytes, 0  # several prompts share a body
        self._check_room(path[0], nbytes)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[path[0]] += 1
        self._line.put(path, (message_id, future), nbytes)
        self._let_in()
        try:
            async with asyncio.timeout(min(longest_s, LONGEST_WAIT_S)):
                await future
        except BaseException as error:
            if future.cancelled():
                self._line.remove(path, lambda each: each[0] == message_id)
            else:
                self.leave(message_id)  # it was let in when its client left
            if isinstance(error, TimeoutError):
                raise _overloaded("the gateway did not take the request in time") from None
            raise
        finally:
            _count_less(self._waiting, path[0])

    def leave(self, message_id: int) -> None:
        """Note that the gateway has read a message, or that it was not sent."""
        if (found := self._unread.pop(message_id, None)) is not None:
            _count_less(self._places, found[0])
            self._let_in()

    def leave_all(self) -> None:
        """Note that the connection is lost."""
        self._unread.clear()
        self._places.clear()
        self._let_in()

    def _let_in(self) -> None:
        self._forget_lost()
        while (taken := self._line.take(self._may_enter)) is not None:
            path, (message_id, future) = taken
            self._line.charge(path, 1.0)
            if not future.done():  # else its client has just left
                self._unread[message_id] = path[0], self._clock_s()
                self._places[path[0]] += 1
                future.set_result(None)

    def _may_enter(self, owner: str) -> bool:
        return self._places[owner] < self._size - len(self._unread)

    def _forget_lost(self) -> None:
        before_s = self._clock_s() - FORGET_S
        while self._unread:
            message_id, (owner, since_s) = next(iter(self._unread.items()))
            if since_s > before_s:
                return
            del self._unread[message_id]
            _count_less(self._places, owner)

    def _check_room(self, owner: str, nbytes: int) -> None:
        if self._waiting[owner] >= MOST_WAITING:
            raise _overloaded(f"{MOST_WAITING} requests of this client wait to be sent on, the limit")
        of_owner = self._line.bytes_of((owner,)) + nbytes
        if of_owner > MOST_BYTES:
            raise _overloaded(f"requests of this client that wait have {of_owner} bytes, the limit is {MOST_BYTES}")
        if self._line.nbytes + nbytes > MOST_TOTAL_BYTES:
            raise _overloaded(f"requests that wait have {self._line.nbytes} bytes, the limit is {MOST_TOTAL_BYTES}")


def _count_less(counts: Counter[str], owner: str) -> None:
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]


def _overloaded(text: str) -> RequestFailed:
    return RequestFailed("overloaded", f"{text}; try again", RETRY_AFTER_S)
