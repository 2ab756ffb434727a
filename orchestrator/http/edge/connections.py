"""Bounds of a connection that uvicorn's protocols lack: sizes and times of all parts of a request, and their number.

Theory. A connection without a deadline is what slow attacks use: they open thousands and send a byte now and then. So
one timer runs whenever the server waits for a client's bytes: `head_timeout_s` from the first byte of a head (or from
the beginning of the connection) to its end, then `REST_TIMEOUT_S` to the end of the body. Between two requests
uvicorn's own keep-alive timer runs, until a byte comes. Past the most connections, the one that has waited longest
without a request ends; if there is none, the one whose body has been missing longest; then the one that has had an
answer longest of which nothing is taken. A connection of which nothing is taken for `SEND_TIMEOUT_S` ends too, also
when it was closed: what is left of an answer would keep it open.

Requests that come before the answer to an earlier one wait, at most `MOST_IN_LINE`, and nothing more is read meanwhile.
A connection with more of them ends after the last answer.

What follows a head and is not its body has a bound too: sizes and extensions of chunks, trailers, and empty lines
before the next request. Trailers are dropped; uvicorn would keep them all.

This server has one protocol, and a request that asks for another one is answered as if it had not asked. Java's client
asks for HTTP/2 with each first request. The parser leaves the body of such a request unread, and would take it for the
next request. So it gets the head a second time, without the question.
"""

import asyncio
import sys
from itertools import chain
from typing import Any, ClassVar, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mgpu.orchestrator.http.edge.body import BODY_TIMEOUT_S, MAX_BODY_BYTES
from mgpu.orchestrator.http.edge.errors import HttpError
from mgpu.orchestrator.http.edge.event_stream import SEND_TIMEOUT_S

REST_TIMEOUT_S = BODY_TIMEOUT_S + 5.0
"""Past the body's own deadline, which gets an answer."""
MAX_HEAD_BYTES = 64 << 10
MAX_FRAMING_BYTES = MAX_BODY_BYTES
"""Beside the body: enough for chunks of six bytes."""
MOST_IN_LINE = 16
LOOKS = 3
"""At what a client has not taken, in `SEND_TIMEOUT_S`."""


class Endable(Protocol):
    """A connection that may be ended to make room."""

    transport: asyncio.Transport


class BoundedProtocol(HttpToolsProtocol):
    """One connection with a bounded head, and a deadline for whatever it has begun to send."""

    most_connections = 10_000
    head_timeout_s = 10.0
    send_timeout_s = SEND_TIMEOUT_S
    _idle: ClassVar[dict[Endable, None]] = {}
    """Connections without a request or before their TLS handshake, the one that has waited longest first."""
    _bodiless: ClassVar[dict[Endable, None]] = {}
    """Those whose request has a body that has not come yet, in the same order."""
    _unread: ClassVar[dict[Endable, None]] = {}
    """Those whose client takes too little of its answer, in the same order."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._is_in_head = True
        self._data = b""
        """What is being parsed."""
        self._wants_other_protocol = False
        self._framing_bytes = 0
        """Since the last head, but for the body."""
        self._answered: RequestResponseCycle | None = None
        self._left: asyncio.Future[None] | None = None
        """Done when the client of that request is gone."""
        self._is_full = False
        """So many requests wait that no more are read from this connection."""
        self._unsent_bytes, self._looks = 0, 0
        """What the client had not taken at the last look, and at how many looks it was the same."""
        self._reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.admit(self)
        self._arm(self.head_timeout_s)
        self._watch_reader()

    def admit(self, connection: Endable) -> None:
        """Count a connection that has no request yet. Past the most, end another one."""
        self.connections.add(connection)  # type: ignore[arg-type]
        if len(self.connections) > self.most_connections:
            self._end_one_for(connection)
        self._idle[connection] = None

    def dismiss(self, connection: Endable) -> None:
        """Count a connection no more."""
        self.connections.discard(connection)
        self._idle.pop(connection, None)

    def connection_lost(self, exc: Exception | None) -> None:
        for each in (self._idle, self._bodiless, self._unread):
            each.pop(self, None)
        self._disarm()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
        if self._answered is not None:  # uvicorn tells the last of pipelined requests alone
            self._answered.disconnected = True
            self._answered.message_event.set()
        if self._left is not None and not self._left.done():
            self._left.set_result(None)
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered, self._left = cycle, self.loop.create_future()
        cycle.scope["left"] = self._left  # type: ignore[typeddict-unknown-key]
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self._is_full:
            return
        if self._is_in_head:
            self._head_bytes += len(data)
        else:
            self._framing_bytes += len(data)
        self._parse(data)
        if self._is_full or self.transport.is_closing():
            return
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif self._framing_bytes > MAX_FRAMING_BYTES:
            self._refuse(413, f"chunk sizes, trailers and empty lines may have {MAX_FRAMING_BYTES} bytes")
        elif self._is_unwatched:
            self._arm(self.head_timeout_s)

    def _parse(self, data: bytes) -> None:
        self._data = data
        super().data_received(data)
        self._data = b""

    def _unsupported_upgrade_warning(self) -> None:
        """Parse on where uvicorn drops what it was sent: it calls this for a request that wants another protocol."""
        found = sys.exception()
        assert isinstance(found, httptools.HttpParserUpgrade)
        if not self._wants_other_protocol:
            return
        self._wants_other_protocol = False
        rest = self._data[found.args[0] :]
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self._parse(b"\r\n".join([*lines, b"", rest]))

    def _head_size(self) -> int:
        """Return the bytes of a head that is complete, without the spaces in it: it may have come with what follows."""
        return len(self.url) + sum(len(name) + len(value) + 3 for name, value in self.headers)

    def _refuse_head(self) -> None:
        self._refuse(431, f"the head of a request may have {MAX_HEAD_BYTES} bytes")

    @property
    def _is_unwatched(self) -> bool:
        """True between two requests after some bytes that begin none: they have ended uvicorn's timer."""
        is_between = self.cycle is None or self.cycle.response_complete
        return is_between and self._timer is None and self.timeout_keep_alive_task is None

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes -= len(body)
        super().on_body(body)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MOST_IN_LINE:
            self._is_full, self.cycle.keep_alive = True, False
            raise ValueError("too many in line")  # so that nothing more is parsed
        self._is_in_head = True
        if self._timer is None:
            self._arm(self.head_timeout_s)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._head_size() > MAX_HEAD_BYTES:
            self._refuse_head()
            raise ValueError("too large")  # so that nothing behind it is read
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("no proxy")
            self._wants_other_protocol = True
            return
        self._is_in_head, self._head_bytes, self._framing_bytes = False, 0, 0
        self._idle.pop(self, None)
        self._bodiless[self] = None
        self._arm(REST_TIMEOUT_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._wants_other_protocol:
            return
        self._disarm()
        self._bodiless.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline or self._is_full:
            self.flow.pause_reading()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self._idle[self] = None

    def send_400_response(self, msg: str) -> None:
        if not (self._is_full or self.transport.is_closing()):
            self._refuse(400, "this is no HTTP request")

    def _end_one_for(self, connection: Endable) -> None:
        """End the connection that is worth least. If all others wait for the server, end this one."""
        found = next(chain(self._idle, self._bodiless, self._unread), connection)
        for each in (self._idle, self._bodiless, self._unread):
            each.pop(found, None)  # it may take a turn of the loop to end
        found.transport.abort()

    def pause_writing(self) -> None:
        self._unread[self] = None
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread.pop(self, None)
        super().resume_writing()

    def _watch_reader(self) -> None:
        """End the connection if nothing of what is to be sent was taken at some looks in a row."""
        unsent_bytes = self.transport.get_write_buffer_size()
        self._looks = self._looks + 1 if unsent_bytes and unsent_bytes == self._unsent_bytes else 0
        if self._looks == LOOKS:
            self.transport.abort()
            return
        self._unsent_bytes = unsent_bytes
        self._reader_timer = self.loop.call_later(self.send_timeout_s / LOOKS, self._watch_reader)

    def _refuse(self, status: int, text: str) -> None:
        """Answer, if no answer has begun, and end the connection."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
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
