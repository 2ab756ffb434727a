"""The connection of one `AsyncClient`: a session with the server, read by the event loop that uses it."""

import asyncio
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import zmq

from mgpu.protocol.client.transport import timeouts
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.client.transport.session import Reply, Session
from mgpu.protocol.client.transport.wake import Wake
from mgpu.protocol.client.transport.window import Window
from mgpu.protocol.discovery import ServerFinder
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.keys import ClientKeys

Sent = TypeVar("Sent")


class AsyncConnection:
    """Connects when this is first needed, and anew in another event loop, after a fork, or to a restarted server."""

    def __init__(
        self,
        endpoint: str | None,
        keys: str | Path | ClientKeys | None,
        limits: timeouts.ClientTimeouts,
        window: Window | None = None,
    ) -> None:
        """Nothing is connected yet. Requests and queries go through ``window``, if there is one."""
        self.is_closed = False
        self._server = ServerFinder(endpoint)
        self._keys = keys
        self._limits = limits
        self._window = window
        self._open: Session | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._progress = Wake()

    @property
    def endpoint(self) -> str | None:
        """The server's endpoint; None if none was named and none was needed yet."""
        return self._server.found or self._server.named

    async def begin(self, request: ResumableRequest, longest_s: float) -> None:
        """Send a request, after waiting for the server, ``longest_s`` at most, if need be."""
        await self._send(request.id, longest_s, lambda session: session.begin(request))
        self.read()

    async def ask(self, message: Mapping[str, object], reply_type: type[Reply], *waits_s: float) -> Reply:
        """Ask and wait for the reply; ``waits_s`` are for `until_reply`."""
        query_id = message["id"]
        assert isinstance(query_id, int)
        session = await self._send(query_id, min(waits_s, default=math.inf), lambda session: _ask(session, message))
        try:
            self.read()
            await self._wait(timeouts.until_reply(session, query_id, *waits_s))
            return session.take_reply(query_id, reply_type)
        finally:
            if session is self._open:  # else it is closed
                session.forget(query_id)

    async def _send(self, message_id: int, longest_s: float, send: Callable[[Session], Sent]) -> Sent:
        """Send a message when the server is connected, and the window lets it through."""
        session = await self.connect(longest_s)
        if self._window is None:
            return send(session)
        await self._window.enter(message_id, longest_s)
        try:
            return send(await self.connect(longest_s))  # the connection may have been lost meanwhile
        except BaseException:
            self._window.leave(message_id)
            raise

    async def connect(self, longest_s: float = math.inf) -> Session:
        """Return the session once the server is connected, the first time or after a disconnection."""
        self._leave_ended_server()
        session = self._opened()
        try:
            await self._wait(timeouts.until_connected(session, self._limits, longest_s))
        except MgpuError:
            if session is self._open and not session.requests and not session.channel.server_has_ended():
                self._disconnect()  # the next call tries again
            raise
        return session

    def read(self) -> None:
        """Handle what has arrived. A ZeroMQ descriptor only reports changes, so this also follows every send."""
        if self._open is not None and self._open.receive():
            self._progress.set()

    def waits_for(self, request: ResumableRequest, deadline_s: float) -> Iterable[float]:
        """Return how long to wait for a piece of the answer or its end; see timeouts.py."""
        return timeouts.until_progress(self._opened(), request, deadline_s, self._limits)

    def cancel(self, request: ResumableRequest) -> None:
        """End a request, here and at the server. In a child of the process that began it, do nothing."""
        if self._open is not None and not request.has_ended and self._pid == os.getpid():
            self._open.cancel(request)
            self.read()

    def cancel_soon(self, request_id: int) -> None:
        """End a request that is in flight, from within `read`."""
        if self._open is not None and self._loop is not None and request_id in self._open.requests:
            self._open.cancel(self._open.requests[request_id])
            self._loop.call_soon(self.read)  # it follows every send

    def close(self) -> None:
        """End everything in flight and close the socket; a second call does nothing."""
        self.is_closed = True
        self._disconnect()

    def _opened(self) -> Session:
        loop = asyncio.get_running_loop()
        if self.is_closed:
            raise MgpuError("the client is closed")
        if loop is not self._loop:
            self._leave_loop()
        if self._open is None:
            self._open, self._loop, self._pid = self._new_session(), loop, os.getpid()
            self._progress = Wake()
            for fd in self._fds(self._open):
                loop.add_reader(fd, self.read)
            self.read()
        return self._open

    def _new_session(self) -> Session:
        return Session(self._server.endpoint(), self._keys, window=self._window)

    def _leave_ended_server(self) -> None:
        """Disconnect if the server has ended and another is to be used. What is in flight fails."""
        session = self._open
        if session is None or self._pid != os.getpid() or self._loop is not asyncio.get_running_loop():
            return
        self.read()
        if not session.channel.is_connected and self._server.endpoint() != session.channel.endpoint:
            session.fail_all(session.channel.ended())
            self._disconnect()

    def _leave_loop(self) -> None:
        """Forget the event loop of earlier calls. MgpuError if it still runs."""
        if self._open is not None and self._pid == os.getpid() and self._loop is not None and self._loop.is_running():
            raise MgpuError("this AsyncClient is in use in another event loop, which still runs; make one per loop")
        self._disconnect()

    def _disconnect(self) -> None:
        session, self._open = self._open, None
        if session is None or self._loop is None or self._pid != os.getpid():
            return
        if not self._loop.is_closed():
            for fd in self._fds(session):
                self._loop.remove_reader(fd)
        session.close()

    def _fds(self, session: Session) -> list[int]:
        return [int(socket.getsockopt(zmq.FD)) for socket in (session.channel.socket, session.channel.monitor)]

    async def _wait(self, waits: Iterable[float]) -> None:
        """Wait until ``waits`` ends. It yields how long to poll next; see timeouts.py."""
        for seconds in waits:
            self._progress.clear()
            await self._progress.wait(seconds)
            self.read()


def _ask(session: Session, message: Mapping[str, object]) -> Session:
    session.ask(message)
    return session
