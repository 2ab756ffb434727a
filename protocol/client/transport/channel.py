"""The socket of a client: send and receive messages, and know the state of the connection. No waiting."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import finalize

import zmq
from zmq.utils.monitor import parse_monitor_message

from mgpu.protocol.discovery import START_HINT, server_has_ended
from mgpu.protocol.errors import MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.front import framing
from mgpu.protocol.front.frames import receive_frames, send_message
from mgpu.protocol.keys import KEYS_VARIABLE, ClientKeys, fingerprint, use_client_keys

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
CONNECTED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED
_OTHER_MECHANISM = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
"""One side has keys and the other has none."""

Event = tuple[int, int]
"""An event of the socket's monitor and its value."""
_inherited: list[object] = []
"""Sockets of a parent process, kept so that nothing closes them."""


class Channel:
    """A DEALER socket and its event monitor. libzmq connects in the background, and again after a disconnection."""

    def __init__(self, endpoint: str, keys: ClientKeys | None = None) -> None:
        """Begin to connect. ServerUnreachable for a malformed endpoint. ``keys`` are for tcp only."""
        if endpoint.startswith(("http://", "https://")):
            raise ServerUnreachable(
                f"{endpoint!r} is not an endpoint but an HTTP address, for curl and HTTP clients such as openai; use "
                "ipc:///path or tcp://host:port, or name none: the server that runs on this machine is found"
            )
        self.endpoint = endpoint
        self.is_connected = False
        self.was_connected = False
        """A handshake has succeeded at some time."""
        self.refusal: ServerUnreachable | None = None
        """Why connecting cannot succeed, once that is known."""
        self._bundle = 0
        self._unsent: list[bytes] = []
        self._keys = keys
        self._handshake_failed = False
        context: zmq.Context[Any] = zmq.Context()
        self.socket = context.socket(zmq.DEALER)
        framing.set_client_options(self.socket, endpoint)
        if keys is not None:
            use_client_keys(self.socket, keys)
        self.monitor = self.socket.get_monitor_socket(_EVENTS)
        # Without this, the garbage collector may come to the context before the sockets, and wait for them for ever.
        self._finalizer = finalize(self, _close, os.getpid(), context, self.socket, self.monitor)
        self._finalizer.atexit = False
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ServerUnreachable(
                f"{endpoint!r} is not an endpoint ({error}); use ipc:///path or tcp://host:port"
            ) from None

    def send(self, message: Mapping[str, object]) -> None:
        """Send one message. RequestFailed if the server could not read it; ServerUnreachable if it cannot be sent."""
        if self.socket.closed:
            raise MgpuError("the client is closed")
        try:
            frames = framing.pack(message)
        except ValueError as error:
            raise RequestFailed("bad_request", str(error)) from None
        self._check(frames)
        if self._bundle:
            self._unsent.append(frames[1])
            if len(self._unsent) >= self._bundle:
                self.flush()
            return
        try:
            send_message(self.socket, *frames)
        except zmq.Again:
            raise self.unreachable("does not take messages") from None

    def _check(self, frames: list[bytes]) -> None:
        """Raise RequestFailed for what the server could not decode.

        Its answer to that has no id. So it would end every request of this connection, also those of others.
        """
        size, limit = len(frames[1]), framing.FROM_CLIENT.frame_bytes
        if size > limit:
            raise RequestFailed("bad_request", f"the request has {size} bytes, the limit is {limit}")
        try:
            framing.unpack(frames)
        except framing.WireError as error:
            raise RequestFailed(error.code, f"the request cannot be sent: {error}") from None

    def bundle(self, count: int) -> None:
        """Keep messages from now on until there are so many, or `flush` is called.

        Each message that libzmq's thread finds alone wakes it, and this costs both as much as the message.
        """
        self._bundle = count

    def flush(self) -> None:
        """Send what was kept. The socket has no bound, so it takes everything."""
        unsent, self._unsent = self._unsent, []
        for body in unsent:
            send_message(self.socket, framing.VERSION, body)

    def receive(self) -> Iterator[list[bytes]]:
        """Yield the frames of each message that has arrived."""
        yield from _drain(self.socket)

    def read_events(self) -> list[Event]:
        """Return the connection's events that have come, the oldest first. `note` them after reading the messages."""
        parsed = map(parse_monitor_message, _drain(self.monitor))
        return [(event["event"], event["value"]) for event in parsed]

    def note(self, events: Iterable[Event]) -> bool:
        """Take events into account, the oldest first. Return True if any connection was lost."""
        lost = False
        for event, value in events:
            lost |= event == zmq.EVENT_DISCONNECTED
            self.is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.was_connected |= self.is_connected
            if event & _FAILED:
                refusal = self._refusal(event, value)
                self.refusal = refusal or self.refusal
                self._handshake_failed |= refusal is None
        return lost

    def _refusal(self, event: int, value: int) -> ServerUnreachable | None:
        """Say why a handshake failed; None if the event does not tell."""
        at = f"the server at {self.endpoint}"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            if self._keys is None:
                return ServerUnreachable(f"{at} belongs to another user")
            key = fingerprint(self._keys.public)
            return ServerUnreachable(f"{at} refuses this client's key {key}: it is not on the server's list")
        if value != _OTHER_MECHANISM:
            return None
        if self._keys is not None:
            return ServerUnreachable(f"{at} has no keys; connect without one (keys, --keys, {KEYS_VARIABLE})")
        return ServerUnreachable(
            f"{at} lets in only clients with a key; name yours with keys=, --keys or {KEYS_VARIABLE} "
            "(mgpu-launch keygen --client NAME makes one)"
        )

    def server_has_ended(self) -> bool:
        """Return True if the server to which this client was connected has ended for good."""
        return self.was_connected and server_has_ended(self.endpoint)

    def unreachable(self, what: str) -> ServerUnreachable:
        """Return the error which says that the server does ``what`` ("does not answer") and what to do about it."""
        if self._handshake_failed and not self.was_connected and self.endpoint.startswith("tcp:"):
            return ServerUnreachable(f"the server at {self.endpoint} ends every attempt to connect: {self._key_hint()}")
        return ServerUnreachable(f"the server at {self.endpoint} {what}; is it running? If not, {START_HINT}")

    def ended(self) -> ServerUnreachable:
        """Return the error which says that the server has ended for good."""
        return ServerUnreachable(f"the server at {self.endpoint} has ended; {START_HINT}")

    def silent(self, seconds: float) -> ServerUnreachable:
        """Return the error for a request of which nothing was heard for so long."""
        if self.is_connected:
            return self.unreachable(f"has been silent for {seconds:g} s")
        return self.unreachable(f"closed the connection and did not come back within {seconds:g} s")

    def _key_hint(self) -> str:
        """Guess why handshakes fail: a server that is quick to close the connection does not get to say it."""
        if self._keys is None:
            return f"it probably lets in only clients with a key; name yours with keys=, --keys or {KEYS_VARIABLE}"
        server = fingerprint(self._keys.server)
        return f"its key is probably not {server}, the one in this client's key file, or it has no keys"

    def close(self) -> None:
        """Close the sockets; a second call does nothing. What is unsent has LINGER milliseconds to go out.

        A child process leaves alone what it inherited: closing it would wait for threads that exist in the parent only.
        """
        if (still_open := self._finalizer.detach()) is not None:
            self.flush()
            _, close, arguments, _ = still_open
            close(*arguments)


def _close(pid: int, context: "zmq.Context[Any]", socket: "zmq.Socket[Any]", monitor: "zmq.Socket[Any]") -> None:
    if pid != os.getpid():
        _inherited.append((context, socket, monitor))
        return
    socket.disable_monitor()
    monitor.close(linger=0)
    socket.close()
    context.term()


def _drain(socket: "zmq.Socket[Any]") -> Iterator[list[bytes]]:
    while not socket.closed:
        try:
            frames = receive_frames(socket)
        except zmq.Again:
            return
        yield frames
