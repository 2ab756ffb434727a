"""The requests and queries in flight between one client and its server. No waiting: both clients share it.

A session lasts as long as its server or its client. Its channel may lose the connection and make another meanwhile.
"""

import contextlib
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from mgpu.protocol.client.transport.channel import CONNECTED, Channel, Event
from mgpu.protocol.client.transport.resumable import RETRY_S, ResumableRequest, error_of
from mgpu.protocol.client.transport.window import Window
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front import framing
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.server_messages import (
    Accepted,
    Detokenized,
    Failed,
    Health,
    Keepalive,
    Models,
    ServerMessage,
    Stats,
    Tokenized,
    parse_server_message,
)
from mgpu.protocol.keys import ClientKeys, find_client_keys

BATCH_ID = 2**63 - 1
"""Of the message that has no answer; a server that does not know it answers `failed`, of which nothing comes."""

Reply = TypeVar("Reply", Health, Stats, Models, Tokenized, Detokenized)


class Session:
    """Send requests, hand each message that arrives to its request, and resume requests on a new connection."""

    def __init__(
        self,
        endpoint: str,
        keys: str | Path | ClientKeys | None,
        takes_batches: bool = False,
        window: Window | None = None,
    ) -> None:
        """Begin to connect. ``keys`` or their file are for tcp; else MGPU_KEYS.

        ``takes_batches``: several messages may come as one. This pays where many requests share a connection.
        ``window`` is told what the server has said something about.
        """
        if not endpoint.startswith("tcp://"):
            keys = None
        elif not isinstance(keys, ClientKeys):
            keys = find_client_keys(keys)
        self.channel = Channel(endpoint, keys)
        self.secret = secrets.token_hex(16)
        """Secret of this client. (session, request id) identifies a request also after a reconnection."""
        self.requests: dict[int, ResumableRequest] = {}
        self._takes_batches = takes_batches
        self._window_of_sends = window
        self._resume_at_s = math.inf
        """The earliest `resume_at_s` of the requests."""
        self._asked: dict[int, float] = {}
        """When the server last said anything about each open query."""
        self._replies: dict[int, ServerMessage | MgpuError] = {}
        self._refused: dict[int, float] = {}
        """When to send a request again that an overloaded server has refused."""
        self._window = 0
        """How many requests of this client the server was busy with when it last refused one."""

    def begin(self, request: ResumableRequest) -> None:
        """Send a request. Raises what `Channel.send` does."""
        if "session" not in request.message:
            request.message = {"session": self.secret, **request.message}
        self.channel.send(request.message)
        self.requests[request.id] = request

    def cancel(self, request: ResumableRequest) -> None:
        """End a request, here and at the server."""
        request.close()
        self._refused.pop(request.id, None)
        if self.requests.pop(request.id, None) is not None:
            self.send_cancel(request.id)

    def send_cancel(self, request_id: int) -> None:
        """Tell the server to end a request."""
        self._try_to_send({"type": "cancel", "id": request_id})

    def until_retry_s(self) -> float:
        """Return the seconds until a refused request is sent again; infinity if none waits."""
        left_s = next(iter(self._refused.values()), math.inf) - time.monotonic()
        return left_s if left_s > 0 else math.inf  # else it waits until another request ends

    def ask(self, message: Mapping[str, object]) -> int:
        """Send a query and return its id, for `take_reply` or `forget`. Raises what `Channel.send` does."""
        self.channel.send(message)
        query_id = message["id"]
        assert isinstance(query_id, int)
        self._asked[query_id] = time.monotonic()
        return query_id

    def heard_s(self, query_id: int) -> float:
        """Return when the server last said anything about an open query."""
        return self._asked[query_id]

    def forget(self, query_id: int) -> None:
        """Abandon a query: tell the server to end it, and skip a reply that comes nevertheless."""
        if self._asked.pop(query_id, None) is not None and self._replies.pop(query_id, None) is None:
            self.send_cancel(query_id)

    def has_reply(self, query_id: int) -> bool:
        """Return True if a query has been answered."""
        return query_id in self._replies

    def take_reply(self, query_id: int, kind: type[Reply]) -> Reply:
        """Return the reply to a query. RequestFailed if the query failed."""
        reply = self._replies.pop(query_id)
        del self._asked[query_id]
        if isinstance(reply, MgpuError):
            raise reply
        if isinstance(reply, Failed):
            raise error_of(reply)
        if not isinstance(reply, kind):
            raise self._not_our_protocol(f"{type(reply).__name__} instead of {kind.__name__}")
        return reply

    def receive(self, most: int | None = None) -> bool:
        """Handle the messages, ``most`` of them, and the events that have arrived. Return True if there were any."""
        events = self.channel.read_events()
        received = bool(events)
        for frames in islice(self.channel.receive(), most):
            received = True
            self._on_frames(frames)
        # Events come after messages: what a server says before it closes the connection still counts.
        self._on_events(events)
        if self._refused:
            self._retry()
        if not self.channel.is_connected and self.requests and self.channel.server_has_ended():
            self.fail_all(self.channel.ended())
        return received

    def fail_all(self, error: MgpuError) -> None:
        """End all requests and queries with an error."""
        for query_id in self._asked:
            self._replies.setdefault(query_id, error)
        requests, self.requests = self.requests, {}
        self._refused.clear()
        for request in requests.values():
            request.fail(error)
        self._leave_window()

    def close(self) -> None:
        """Cancel what is in flight and close the socket."""
        for request_id in list(self.requests):
            self.send_cancel(request_id)
        self.fail_all(MgpuError("the client is closed"))
        self.channel.close()

    def _leave_window(self) -> None:
        if self._window_of_sends is not None:
            self._window_of_sends.leave_all()

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            for data in framing.unpack_batch(frames):
                if not self._was_relayed(data):
                    self._on_message(parse_server_message(data))
        except (framing.WireError, FieldError) as error:
            self.fail_all(self._not_our_protocol(str(error)))

    def _was_relayed(self, data: dict[object, object]) -> bool:
        """Hand a message about a request on as it came, if there is somebody for that."""
        request_id = data.get("id")
        request = self.requests.get(request_id) if type(request_id) is int else None
        if request is None or request.relay is None:
            return False
        try:
            if not request.relay(data):
                return False
        except FieldError:
            raise
        except Exception as error:  # what goes wrong with one answer must end no other one on this connection
            self._end_unreadable(request, error)
        if request.has_ended:
            self.requests.pop(request.id, None)
        return True

    def _on_message(self, message: ServerMessage) -> None:
        if self._window_of_sends is not None and message.id is not None:
            self._window_of_sends.leave(message.id)
        if message.id is None:
            if not isinstance(message, Failed):
                raise FieldError(f"{type(message).__name__} without an id")
            self.fail_all(error_of(message))
        elif message.id in self.requests:
            self._on_request_message(self.requests[message.id], message)
        elif message.id in self._asked:
            if isinstance(message, Keepalive):
                self._asked[message.id] = time.monotonic()
            else:
                self._replies[message.id] = message
        elif isinstance(message, Accepted):
            # Sent just before a connection was lost, cancelled here, and delivered by the next connection all the same.
            self.send_cancel(message.id)

    def _on_request_message(self, request: ResumableRequest, message: ServerMessage) -> None:
        if isinstance(message, Failed) and request.can_retry(message):
            self._refuse(request, message.retry_after_s or RETRY_S)
            return
        try:
            to_send = request.take(message)
        except FieldError:
            raise
        except Exception as error:  # the text of one answer must end no other one on this connection
            self._end_unreadable(request, error)
            return
        if to_send is not None:
            self._try_to_send(to_send)
        self._resume_at_s = min(self._resume_at_s, request.resume_at_s)
        if request.has_ended:
            self.requests.pop(request.id, None)

    def _end_unreadable(self, request: ResumableRequest, error: Exception) -> None:
        request.fail(MgpuError(f"the answer could not be read: {type(error).__name__}: {error}"))
        self.cancel(request)

    def _refuse(self, request: ResumableRequest, retry_after_s: float) -> None:
        self._refused[request.id] = time.monotonic() + retry_after_s
        request.heard_s = math.inf  # the server owes it nothing meanwhile
        self._window = len(self.requests) - len(self._refused)

    def _retry(self) -> None:
        """Send again what was refused and is due, the oldest first.

        No more requests than the server took last time are under way together, so that a thousand requests against a
        limit of 256 do not all try again at once: each that ends makes room for one. Waiting for room costs no try.
        """
        now = time.monotonic()
        room = max(1, self._window) - (len(self.requests) - len(self._refused))
        for request_id, at_s in list(self._refused.items()):
            request = self.requests.get(request_id)
            if request is not None and not request.is_interrupted:
                if not self.channel.is_connected or room <= 0 or now < at_s:
                    break
                request.retries -= 1
                room -= 1
                self._try_to_send(request.message)
            del self._refused[request_id]  # it was sent, has ended, or is resumed, which sends it too
            if request is not None:
                request.heard_s = now

    def _on_events(self, events: Sequence[Event]) -> None:
        """Take in what became of the connection, then resume the requests that are due.

        Several connections can have been made and lost since the last call. Each request is resumed once.
        """
        if self._takes_batches and any(event == CONNECTED for event, _ in events):
            self._try_to_send({"type": "batch", "id": BATCH_ID})
        if self.channel.note(events):
            self._leave_window()
            for request in self.requests.values():
                request.disconnect()
                self._resume_at_s = request.resume_at_s
        if self.channel.is_connected and time.monotonic() >= self._resume_at_s:
            self._resume_requests()

    def _resume_requests(self) -> None:
        """Send `resume` for each request that is due."""
        now, requests = time.monotonic(), list(self.requests.values())
        for request in requests:
            if now >= request.resume_at_s:
                self._try_to_send(request.resume())
        self._resume_at_s = min((request.resume_at_s for request in requests), default=math.inf)

    def _try_to_send(self, message: Mapping[str, object]) -> None:
        """Send a message. If the connection is lost meanwhile, the next one begins with a `resume` of each request."""
        with contextlib.suppress(MgpuError):
            self.channel.send(message)

    def _not_our_protocol(self, problem: str) -> MgpuError:
        return MgpuError(f"the server at {self.channel.endpoint} does not speak this protocol: {problem}")
