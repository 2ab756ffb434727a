"""One client's socket and its open requests, without any waiting: shared by the sync and the asyncio client."""

import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from mgpu.protocol.client.answer import Answer, error_of
from mgpu.protocol.client.endpoint import START_HINT, find_endpoint, server_has_ended
from mgpu.protocol.errors import MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.front import framing
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.server_messages import (
    Accepted,
    Failed,
    Health,
    Models,
    Resumed,
    ServerMessage,
    Stats,
    parse_server_message,
)
from mgpu.protocol.keys import KEYS_VARIABLE, ClientKeys, find_client_keys, fingerprint, use_client_keys

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED
_OTHER_MECHANISM = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
"""One side has keys and the other has not."""

RETRY_S = 1.0
"""When to ask again if the server does not say."""

Reply = Health | Stats | Models


def open_connection(endpoint: str | None, keys: str | Path | None) -> "Connection":
    """Begin to connect to what `find_endpoint` gives, with the key file ``keys`` or MGPU_KEYS if tcp needs one."""
    found = find_endpoint(endpoint)
    return Connection(found, find_client_keys(keys) if found.startswith("tcp://") else None)


class Connection:
    """DEALER, its event monitor and the requests in flight. Reads whatever is there; the owner does the waiting."""

    def __init__(self, endpoint: str, keys: ClientKeys | None = None) -> None:
        """Start connecting, which libzmq does in the background. ServerUnreachable for a malformed endpoint.

        ``keys`` are for tcp only; on ipc the kernel says who we are.
        """
        self.endpoint = endpoint
        self._keys = keys
        self.connected = False
        self.was_connected = False
        self._session = secrets.token_hex(16)
        """With a request's id, what the server knows it by on whatever connection; nobody else can name it."""
        self.refused: ServerUnreachable | None = None
        """Why connecting cannot succeed, once that is known."""
        self._handshake_failed = False
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        framing.set_client_options(self.socket, endpoint)
        if self._keys is not None:
            use_client_keys(self.socket, self._keys)
        self.monitor = self.socket.get_monitor_socket(_EVENTS)
        self.answers: dict[int, Answer] = {}
        self._replies: dict[int, Reply | MgpuError] = {}
        self._next_id = 1
        self._to_resume: dict[int, float] = {}
        """When to ask again for requests that the server was too busy to resume."""
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ServerUnreachable(
                f"{endpoint!r} is not an endpoint ({error}); use ipc:///path or tcp://host:port"
            ) from None

    def next_id(self) -> int:
        request_id, self._next_id = self._next_id, self._next_id + 1
        return request_id

    def begin(self, answer: Answer, values: Mapping[str, object]) -> None:
        """Send a generate message, in a form that can be resumed. Raises what `send` does."""
        answer.request = {**values, "session": self._session}
        self.answers[answer.id] = answer
        try:
            self.send(answer.request)
        except MgpuError:
            del self.answers[answer.id]
            raise

    def send(self, values: Mapping[str, object]) -> None:
        """Send one message now. ServerUnreachable when no server is connected or it does not read."""
        try:
            frames = framing.pack(values)
        except ValueError as error:
            raise RequestFailed("bad_request", str(error)) from None
        if len(frames[1]) > framing.FROM_CLIENT.frame_bytes:
            raise RequestFailed(
                "bad_request",
                f"the request has {len(frames[1])} bytes, the limit is {framing.FROM_CLIENT.frame_bytes}",
            )
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            raise self.unreachable("does not take messages") from None

    def receive(self) -> bool:
        """Handle every message and event that has arrived; tell whether there was any."""
        events = self._read_monitor()
        got = bool(events)
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            got = True
            self._dispatch(frames)
        # Only now: what a server says before it closes the connection counts.
        self._on_events(events)
        if self._to_resume:
            self._resume_again()
        if not self.connected and self.answers and self.server_is_gone():
            self.fail_all(self.ended())
        return got

    def _dispatch(self, frames: list[bytes]) -> None:
        try:
            message = parse_server_message(framing.unpack(frames, framing.FROM_SERVER))
            self._deliver(message)
        except (framing.WireError, FieldError) as error:
            self.fail_all(MgpuError(f"the server at {self.endpoint} does not speak this protocol: {error}"))

    def _deliver(self, message: ServerMessage) -> None:
        if message.id is None:
            assert isinstance(message, Failed)
            self.fail_all(error_of(message))
            return
        answer = self.answers.get(message.id)
        if answer is not None and (answer.is_adrift or _is_about_resuming(answer, message)):
            self._deliver_adrift(answer, message)
        elif answer is not None:
            answer.take(message)
            if answer.done:
                del self.answers[message.id]
        elif isinstance(message, (Health, Stats, Models)):
            self._replies[message.id] = message
        elif isinstance(message, Failed) and message.code != "unknown_request":
            self._replies[message.id] = error_of(message)
        elif isinstance(message, Accepted):
            # Sent just as the connection broke, given up, and delivered to the next server all the same.
            self.cancel(message.id)

    def _deliver_adrift(self, answer: Answer, message: ServerMessage) -> None:
        """Take the answer to a `resume`; what else comes was said before and will be said again."""
        if isinstance(message, Resumed):
            self._on_resumed(answer, message)
        elif isinstance(message, Failed):
            if message.code == "unknown_request" and not any(answer.offsets()):
                self._send_again(answer)
            elif message.code in ("overloaded", "not_ready"):
                answer.is_adrift, answer.heard_s = True, time.monotonic()
                self._to_resume[answer.id] = answer.heard_s + (message.retry_after_s or RETRY_S)
            else:
                answer.take(message)
                del self.answers[answer.id]

    def _on_resumed(self, answer: Answer, message: Resumed) -> None:
        """Go on if what follows fits what is there.

        A `resume` that waits while its connection is lost goes out on the next one, before the one that is sent then.
        When both are answered, the second answer repeats what the first has brought. Whoever is adrift has asked with
        what is there and waits for that answer.
        """
        if message.offsets is None or message.offsets == answer.offsets():
            answer.is_adrift, answer.was_resumed = False, True
            answer.take(message)
        elif not answer.is_adrift:
            answer.is_adrift = True
            self._resume(answer)

    def _send_again(self, answer: Answer) -> None:
        """Send a request that did not get as far as the engine, unless that has been done."""
        if not answer.is_adrift:
            return
        answer.is_adrift = answer.was_resumed = False
        if answer.accepted is not None:  # a promise that the engine never heard of; its seed is kept
            answer.request = {**answer.request, "seed": answer.accepted.seed}
        with contextlib.suppress(MgpuError):  # lost once more: the next connection asks again
            self.send(answer.request)

    def _read_monitor(self) -> list[tuple[int, int]]:
        """Give the events that have come, each with its value."""
        events: list[tuple[int, int]] = []
        while True:
            try:
                message = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return events
            events.append((message["event"], message["value"]))

    def _on_events(self, events: Sequence[tuple[int, int]]) -> None:
        """Take in what became of the connection, the oldest first, and ask for what is adrift in the end.

        Once, whatever came: while nobody reads, several connections can have been made and lost.
        """
        for event, value in events:
            self.connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event & _FAILED:
                self._on_failed_handshake(event, value)
            elif event == zmq.EVENT_DISCONNECTED:
                self._to_resume.clear()
                for answer in self.answers.values():
                    answer.is_adrift = True
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.was_connected = True
        if events and self.connected:
            for answer in self.answers.values():
                if answer.is_adrift:
                    self._resume(answer)

    def _on_failed_handshake(self, event: int, value: int) -> None:
        at = f"the server at {self.endpoint}"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._keys is not None:
            key = fingerprint(self._keys.public)
            self.refused = ServerUnreachable(f"{at} refuses this client's key {key}: it is not on the server's list")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.refused = ServerUnreachable(f"{at} belongs to another user")
        elif value == _OTHER_MECHANISM and self._keys is not None:
            self.refused = ServerUnreachable(f"{at} has no keys; connect without one (keys, --keys, {KEYS_VARIABLE})")
        elif value == _OTHER_MECHANISM:
            self.refused = ServerUnreachable(
                f"{at} lets in only clients with a key; name yours with keys=, --keys or {KEYS_VARIABLE} "
                "(mgpu-launch keygen --client NAME makes one)"
            )
        else:
            self._handshake_failed = True

    def _resume(self, answer: Answer) -> None:
        with contextlib.suppress(MgpuError):
            self.send({"type": "resume", "id": answer.id, "session": self._session, "offsets": answer.offsets()})

    def _resume_again(self) -> None:
        now = time.monotonic()
        for request_id in [request_id for request_id, at_s in self._to_resume.items() if now >= at_s]:
            del self._to_resume[request_id]
            answer = self.answers.get(request_id)
            if answer is not None and answer.is_adrift and self.connected:
                self._resume(answer)

    def server_is_gone(self) -> bool:
        """Return True if the server that this client was connected to has ended for good."""
        return self.was_connected and server_has_ended(self.endpoint)

    def fail_all(self, error: MgpuError) -> None:
        """End everything in flight with ``error``."""
        for answer in self.answers.values():
            answer.fail(error)
        self.answers.clear()

    def take_reply(self, request_id: int) -> Reply | None:
        """Give the reply to a query if it is there. RequestFailed when it failed."""
        reply = self._replies.pop(request_id, None)
        if isinstance(reply, MgpuError):
            raise reply
        return reply

    def unreachable(self, what: str) -> ServerUnreachable:
        if self._handshake_failed and not self.was_connected and self.endpoint.startswith("tcp:"):
            return ServerUnreachable(f"the server at {self.endpoint} ends every attempt to connect: {self._key_hint()}")
        return ServerUnreachable(f"the server at {self.endpoint} {what}; is it running? If not, {START_HINT}")

    def _key_hint(self) -> str:
        """Guess why handshakes fail; a server that is quick to close the connection does not get to say it."""
        if self._keys is None:
            return f"it probably lets in only clients with a key; name yours with keys=, --keys or {KEYS_VARIABLE}"
        server = fingerprint(self._keys.server)
        return f"its key is probably not {server}, the one in this client's key file, or it has no keys"

    def ended(self) -> ServerUnreachable:
        return self.unreachable("has ended")

    def silent(self, seconds: float) -> ServerUnreachable:
        """Say that nothing was heard for too long, and why that may be."""
        if self.connected:
            return self.unreachable(f"has been silent for {seconds:g} s")
        return self.unreachable(f"closed the connection and did not come back within {seconds:g} s")

    def cancel(self, request_id: int) -> None:
        """Tell the server to end a request; an unreachable one has nothing left to end."""
        with contextlib.suppress(MgpuError):
            self.send({"type": "cancel", "id": request_id})

    def close(self) -> None:
        """Cancel what is in flight and close the sockets, waiting at most LINGER."""
        for request_id in list(self.answers):
            self.cancel(request_id)
        self.fail_all(MgpuError("the client is closed"))
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close()
        self._context.term()


def _is_about_resuming(answer: Answer, message: ServerMessage) -> bool:
    """Tell whether a message answers a `resume`, though an earlier one was answered already."""
    if isinstance(message, Failed):
        # Nothing else says this of a request that runs; and nothing but `resume` ends in unknown_request.
        busy = answer.was_resumed and message.code in ("overloaded", "not_ready")
        return busy or (message.code == "unknown_request" and not any(answer.offsets()))
    return isinstance(message, Resumed)
