"""Server-sent events: send what an iterator yields, and end the iterator when the client has gone."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Mapping

from starlette.types import Receive, Scope, Send

SEND_TIMEOUT_S = 60.0
"""A client that reads nothing for so long, or half as long again, has gone."""
KEEPALIVE_S = 10.0
"""After so much silence a comment tells proxies and clients that the answer is still to come."""
KEEPALIVE = b": keep-alive\n\n"
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream:
    """A response of which each ``events`` is sent as it comes. An ASGI application."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        self._events = events
        self._sending_since_s = math.inf
        """When the send that goes on now began; infinity between two."""
        self._headers = [(name.encode(), value.encode()) for name, value in {**HEADERS, **headers}.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        watching = asyncio.create_task(until_disconnect(receive))
        try:
            while not sending.done() and not watching.done() and not self._is_stuck():
                await asyncio.wait((sending, watching), timeout=SEND_TIMEOUT_S / 2, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, watching):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        async for event in self._events:
            self._sending_since_s = time.monotonic()
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self._sending_since_s = math.inf
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _is_stuck(self) -> bool:
        """Return True if the client takes nothing. A timer for each event would cost more than sending it."""
        return time.monotonic() - self._sending_since_s >= SEND_TIMEOUT_S


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
