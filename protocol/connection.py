"""One client's socket and its open requests, without any waiting: shared by the sync and the asyncio client."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from mgpu.protocol import wire
from mgpu.protocol.completion import START_HINT, Answer, MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.messages import Accepted, Failed, Health, Models, ServerMessage, Stats, parse_server_message
from mgpu.protocol.runtime import running_servers
from mgpu.protocol.schema import FieldError

ENDPOINT_VARIABLE = "MGPU_ENDPOINT"
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED

Reply = Health | Stats | Models


def find_endpoint(endpoint: str | None) -> str:
    """Give the endpoint to use: the argument, else MGPU_ENDPOINT, else the only running server's.

    ServerUnreachable when there is none, or when several run and none was named.
    """
    endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE)
    if endpoint:
        return endpoint
    servers = running_servers()
    if not servers:
        raise ServerUnreachable(f"no mgpu server is running here; {START_HINT}, or set {ENDPOINT_VARIABLE}")
    if len(servers) > 1:
        listed = ", ".join(f"{server.endpoint} ({server.model})" for server in servers)
        raise ServerUnreachable(f"several mgpu servers are running: {listed}; choose one with {ENDPOINT_VARIABLE}")
    return servers[0].endpoint


class Connection:
    """DEALER, its event monitor and the requests in flight. Reads whatever is there; the owner does the waiting."""

    def __init__(self, endpoint: str) -> None:
        """Start connecting, which libzmq does in the background. ServerUnreachable for a malformed endpoint."""
        self.endpoint = endpoint
        self.connected = False
        self.refused: ServerUnreachable | None = None
        """Why connecting cannot succeed, once that is known."""
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        wire.set_client_options(self.socket, endpoint)
        self.monitor = self.socket.get_monitor_socket(_EVENTS)
        self.answers: dict[int, Answer] = {}
        self._replies: dict[int, Reply | MgpuError] = {}
        self._next_id = 1
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

    def send(self, values: Mapping[str, object]) -> None:
        """Send one message now. ServerUnreachable when no server is connected or it does not read."""
        try:
            frames = wire.pack(values)
        except ValueError as error:
            raise RequestFailed("bad_request", str(error)) from None
        if len(frames[1]) > wire.FROM_CLIENT.frame_bytes:
            raise RequestFailed(
                "bad_request",
                f"the request has {len(frames[1])} bytes, the limit is {wire.FROM_CLIENT.frame_bytes}",
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
        for event in events:
            self._on_event(event)
        return got

    def _dispatch(self, frames: list[bytes]) -> None:
        try:
            message = parse_server_message(wire.unpack(frames, wire.FROM_SERVER))
            self._deliver(message)
        except (wire.WireError, FieldError) as error:
            self.fail_all(MgpuError(f"the server at {self.endpoint} does not speak this protocol: {error}"))

    def _deliver(self, message: ServerMessage) -> None:
        if message.id is None:
            assert isinstance(message, Failed)
            self.fail_all(RequestFailed(message.code, message.message, message.retry_after_s))
            return
        answer = self.answers.get(message.id)
        if answer is not None:
            answer.take(message)
            if answer.done:
                del self.answers[message.id]
        elif isinstance(message, (Health, Stats, Models)):
            self._replies[message.id] = message
        elif isinstance(message, Failed):
            self._replies[message.id] = RequestFailed(message.code, message.message, message.retry_after_s)
        elif isinstance(message, Accepted):
            # Sent just as the connection broke, given up, and delivered to the next server all the same.
            self.cancel(message.id)

    def _read_monitor(self) -> list[int]:
        events: list[int] = []
        while True:
            try:
                events.append(parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))["event"])
            except zmq.Again:
                return events

    def _on_event(self, event: int) -> None:
        self.connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.refused = ServerUnreachable(f"the server at {self.endpoint} belongs to another user")
        elif event == zmq.EVENT_DISCONNECTED:
            self.fail_all(self.unreachable("closed the connection"))

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
        return ServerUnreachable(f"the server at {self.endpoint} {what}; is it running? If not, {START_HINT}")

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
