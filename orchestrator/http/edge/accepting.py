"""Accept connections: a few in each turn of the loop, so that hundreds of newcomers hold nobody up.

asyncio accepts all that wait, two thousand at once, which takes it half a second. So at most `MOST_AT_ONCE` are
accepted in a turn of the loop. With one core or two, accepting has a tenth of the time, because workers and engine need
the core: a flood of connections had taken 0.37 of it. The others wait in the kernel's queue.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress

from mgpu.orchestrator.gateway.front.pace import FEW_CORES, Pace

BACKLOG = 2048
MOST_AT_ONCE = 16
CONNECTION_S = 0.0002
"""What a connection costs, with its end."""
SHARE_OF_FEW_CORES = 0.1
NO_ROOM_PAUSE_S = 0.5
"""After the limit of open files, or of memory, is met."""


class Acceptor:
    """Accepts connections of one listening socket; another owns and closes that."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        num_cores: int = 0,
    ) -> None:
        """``num_cores`` 0: as many as this process may use. The loop must run."""
        is_tight = (num_cores or len(os.sched_getaffinity(0))) <= FEW_CORES
        self._pace = Pace(share=SHARE_OF_FEW_CORES if is_tight else 1.0)
        self._listener, self._make_protocol = listener, make_protocol
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._connecting: set[asyncio.Task[object]] = set()
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._go_on()

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listener)
        if self._timer is not None:
            self._timer.cancel()

    def _go_on(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listener, self._accept)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(seconds, self._go_on)

    def _accept(self) -> None:
        for _ in range(MOST_AT_ONCE):
            try:
                peer, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError:
                self._pause(NO_ROOM_PAUSE_S)
                return
            self._pace.spend(CONNECTION_S)
            self._begin(peer)
        if wait_s := self._pace.wait_s():
            self._pause(wait_s)

    def _begin(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        task: asyncio.Task[object] = self._loop.create_task(
            self._loop.connect_accepted_socket(self._make_protocol, peer)
        )
        self._connecting.add(task)
        task.add_done_callback(self._on_begun)

    def _on_begun(self, task: "asyncio.Task[object]") -> None:
        self._connecting.discard(task)
        with suppress(OSError, asyncio.CancelledError):  # it has ended already
            task.result()
