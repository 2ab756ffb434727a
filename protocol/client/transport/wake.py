"""An event to wait for with a limit: `asyncio.Event` without the task or the context that a limit costs otherwise.

Streams wait for every token, so what a wait costs is a good part of what a token costs.
"""

import asyncio


class Wake:
    """Set by one side, awaited by any number of others. Belongs to one event loop while it is awaited."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: set[asyncio.Future[None]] = set()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """Let all go on that wait, and all that come before the next `clear`."""
        self._is_set = True
        for future in self._waiting:
            _end(future)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self, seconds: float) -> None:
        """Wait until it is set, so many seconds at most."""
        if self._is_set:
            return
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.add(future)
        timer = loop.call_later(max(seconds, 0), _end, future)
        try:
            await future
        finally:
            timer.cancel()
            self._waiting.discard(future)


def _end(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
