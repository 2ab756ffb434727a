"""HTTPS: a connection counts, and has a deadline, from the moment that it is accepted.

Theory. An event loop that is told to speak TLS shows a connection only after its handshake. Those before it would be
bounded by nothing but the descriptors of the process: some hundreds of silent ones, and nobody else gets in. So
connections are accepted without TLS, are counted among those without a request, and begin it here.
"""

import asyncio
import ssl
from typing import cast

from mgpu.orchestrator.http.edge.connections import BoundedProtocol


class TlsHandshake(asyncio.Protocol):
    """A connection until its handshake is over. Then its ``protocol`` has it."""

    def __init__(self, protocol: BoundedProtocol, context: ssl.SSLContext) -> None:
        self.transport: asyncio.Transport
        self._protocol = protocol
        self._context = context
        self._is_lost = False
        self._early = b""
        """What came before the handshake; later what came right behind it, before this side has heard of its end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is of another class
        self.transport.pause_reading()  # what has arrived is for the handshake; uvloop reads all the same
        self._protocol.admit(self)
        self._task = self._protocol.loop.create_task(self._shake_hands())

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._protocol.dismiss(self)

    def shutdown(self) -> None:
        """End the connection, as uvicorn does with all when it stops."""
        self.transport.abort()

    async def _shake_hands(self) -> None:
        """Speak TLS with the client, and hand the connection on. One that fails or takes too long is closed."""
        loop, timeout_s = self._protocol.loop, self._protocol.head_timeout_s
        encrypted: asyncio.Transport | None = None
        try:
            if not self.transport.is_closing():
                handshake = loop.start_tls(
                    self.transport, self, self._context, server_side=True, ssl_handshake_timeout=timeout_s
                )
                encrypted, _ = await asyncio.gather(handshake, self._feed_handshake())
        except (OSError, RuntimeError):  # ssl's errors, lost connections and the time; uvloop's, if it was just ended
            self.transport.abort()
        finally:
            self._protocol.dismiss(self)
        if encrypted is None or self._is_lost or self.transport.is_closing():
            return  # a connection that is lost ends the wait like one whose handshake is over
        encrypted.set_protocol(self._protocol)
        self._protocol.connection_made(encrypted)
        if self._early:
            self._protocol.data_received(self._early)

    async def _feed_handshake(self) -> None:
        """Hand what came before the handshake to the protocol that the loop has for it."""
        await asyncio.sleep(0)  # it has begun, and will say so to that protocol before anything else comes
        if self.transport.is_closing():
            return
        data, self._early = memoryview(self._early), b""
        feeding = cast("asyncio.BufferedProtocol", self.transport.get_protocol())
        while data:
            room = memoryview(feeding.get_buffer(len(data)))
            size = min(len(data), len(room))
            room[:size] = data[:size]
            feeding.buffer_updated(size)
            data = data[size:]
