"""Whose request the loop goes on with: who has cost much lately comes after everybody else.

One loop serves all clients over HTTP, and what it does for one of them the others wait for: a body of four megabytes
takes it a tenth of a second. So the CPU time of each request is counted to its owner, a key or an address. Requests of
owners who have cost little go on at once. Those of the others stand in line, by owner, and one of them has a turn of
the loop: from here to where it next waits. Then the loop looks at all sockets before the next turn. With one core or
two, these turns have 15 % of the time together, because workers and engine need the core.

Example: A sends bodies that take 60 ms each to read, on ten connections, and B streams. The first body makes A one who
has cost much. From then on the events of B are sent between two bodies. On one core there is a body every 0.4 s.

A large body is waited for in line a second time when it is there: until then its request costs next to nothing.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Generator
from types import coroutine
from typing import Any

from starlette.requests import ClientDisconnect

from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.front.pace import FEW_CORES, SHARE_OF_FEW_CORES, Modest, Pace

REQUEST_S = 0.0002
"""What is done for a request before it is known whose it is: uvicorn reads its head and makes a task of it."""

FRONT_S, FRONT_BYTE_S = 0.0015, 50e-9
"""What the gateway and the engine will do for a request with a body, beside its tokens: all that comes over HTTP stands
in one line there, at 15 % of the time, so a flood has to take less than that."""

TurnPath = tuple[str, str]
"""Owner and account: a key or an address, and its connection."""


class LoopTurns:
    """The requests that wait for a turn of the loop, and what their owners have cost."""

    def __init__(self, num_cores: int = 0, clock_s: Callable[[], float] = time.monotonic) -> None:
        """``num_cores`` 0: as many as this process may use."""
        is_tight = (num_cores or len(os.sched_getaffinity(0))) <= FEW_CORES
        self._pace = Pace(clock_s, SHARE_OF_FEW_CORES) if is_tight else None
        self._modest = Modest(clock_s)
        self._line: FairTurns[asyncio.Future[None]] = FairTurns()
        self._taken: TurnPath | None = None
        """Whose turn it is."""
        self._spent_s = 0.0
        """In this turn so far."""
        self._next_look: asyncio.Handle | None = None

    async def begin(self, path: TurnPath, left: "asyncio.Future[None] | None" = None) -> None:
        """Count a new request, and return when its turn has come. ClientDisconnect as in `wait`."""
        self.charge(path[0], REQUEST_S)
        await self.wait(path, left)

    async def wait(self, path: TurnPath, left: "asyncio.Future[None] | None" = None) -> None:
        """Return when the turn of this account has come; at once if its owner has cost little.

        ClientDisconnect as soon as ``left`` is done: nobody waits for the answer any more.
        """
        if self._modest.has(path[0]):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.put(path, future)
        if left is not None:
            left.add_done_callback(lambda _: future.cancel())
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_soon(self._look)
        try:
            await future
        except asyncio.CancelledError:
            if left is not None and left.done():
                raise ClientDisconnect from None
            raise

    def charge(self, owner: str, cpu_s: float) -> None:
        """Note what an owner has cost."""
        self._modest.charge(owner, cpu_s)
        if self._pace is not None and not self._modest.has(owner):
            self._pace.spend(cpu_s)
        if self._taken is not None and self._taken[0] == owner:
            self._spent_s += cpu_s

    def charge_front(self, owner: str, body_bytes: int) -> None:
        """Note what a request with such a body will cost behind this process."""
        self.charge(owner, FRONT_S + FRONT_BYTE_S * body_bytes)

    def _look(self) -> None:
        """Let the next owner have its turn, or look again when there is time for one."""
        loop = asyncio.get_running_loop()
        if self._taken is not None:
            self._line.charge(self._taken, self._spent_s)
        self._taken, self._next_look, self._spent_s = None, None, 0.0
        if not self._line:
            return
        if self._pace is not None and (wait_s := self._pace.wait_s()):
            self._next_look = loop.call_later(wait_s, self._look)
            return
        while (found := self._line.take()) is not None:
            path, future = found
            if not future.done():
                self._taken = (path[0], path[1])
                future.set_result(None)
                self._next_look = loop.call_soon(self._look)  # behind the task that this wakes
                return
            self._line.charge(path, 0.0)  # its client has left


@coroutine
def metered(work: Awaitable[None], charge: Callable[[float], None]) -> Generator[Any, Any, None]:
    """Do ``work``, and tell the CPU time of each of its steps."""
    steps: Generator[Any, Any, None] = work.__await__()
    error: BaseException | None = None
    while True:
        began_s = time.thread_time()
        try:
            waits_for = steps.send(None) if error is None else steps.throw(error)
        except StopIteration:
            return
        finally:
            charge(time.thread_time() - began_s)
        error = None
        try:
            yield waits_for
        except BaseException as raised:  # what was waited for, or the end of the task: the work's own business
            error = raised
