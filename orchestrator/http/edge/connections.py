"""Bounds of a connection that uvicorn's protocols lack: the size and time of a request's head, and their number.

Theory. A connection without a deadline is what slow attacks use: they open thousands and send a byte now and then. So
one timer runs whenever the server waits for a client's bytes: `head_timeout_s` from the first byte of a head (or from
the beginning of the connection) to its end, then `REST_TIMEOUT_S` to the end of the body. Between two requests
uvicorn's own keep-alive timer runs. Past the most connections, the one that has waited longest without a request ends.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mgpu.orchestrator.http.edge.body import BODY_TIMEOUT_S
from mgpu.orchestrator.http.edge.errors import HttpError

REST_TIMEOUT_S = BODY_TIMEOUT_S + 5.0
"""Past the body's own deadline, which gets an answer."""
MAX_HEAD_BYTES = 64 << 10


class BoundedProtocol(HttpToolsProtocol):
    """One connection with a bounded head, and a deadline for whatever it has begun to send."""

    most_connections = 10_000
    head_timeout_s = 10.0
    _idle: ClassVar[dict["BoundedProtocol", None]] = {}
    """Connections without a request, the one that has waited longest first."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._is_in_head = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._idle[self] = None
        self._arm(self.head_timeout_s)
        if len(self.connections) > self.most_connections:
            self._end_one()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the head of a request may have {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        self._is_in_head = True
        if self._timer is None:
            self._arm(self.head_timeout_s)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head, self._head_bytes = False, 0
        self._idle.pop(self, None)
        self._arm(REST_TIMEOUT_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self._idle[self] = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

    def _end_one(self) -> None:
        """End the connection that has been open longest without a request. If all have one, end this one."""
        next(iter(self._idle), self).transport.abort()

    def _refuse(self, status: int, text: str) -> None:
        body = HttpError(status, text, code="bad_http").json()
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _on_timeout(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._is_in_head and self._head_bytes and self in self._idle:
            self._refuse(408, f"the head of the request did not arrive within {self.head_timeout_s:g} s")
        else:
            self.transport.close()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._on_timeout)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
