"""All requests that pass through the router, and what is kept of those that have ended."""

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import cast

import msgpack

from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.router.requests.in_flight import InFlight
from mgpu.orchestrator.router.requests.routed_request import RoutedRequest
from mgpu.protocol.front.server_messages import Failed, ServerMessage, to_map

KEEP_S = 60.0
KEEP_REQUESTS = 4096
"""How long, and how many, ended requests are kept for a client that has missed their end."""

Name = tuple[str, int]
"""The session by which replicas know a client, and its id of the request."""


class RoutedTable:
    """Requests by connection and id, and by name. Sends their clients what is said about them."""

    def __init__(self, front: FrontSocket, in_flight: InFlight | None = None) -> None:
        self._front = front
        self.in_flight = InFlight() if in_flight is None else in_flight
        self._pack = msgpack.Packer(use_bin_type=True).pack
        self._by_connection: dict[bytes, dict[int, RoutedRequest]] = {}
        self._by_name: dict[Name, RoutedRequest] = {}
        self._ended: OrderedDict[Name, RoutedRequest] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[RoutedRequest]:
        return iter([each for requests in self._by_connection.values() for each in requests.values()])

    def get(self, connection: bytes, request_id: int) -> RoutedRequest | None:
        """Return a request that goes on."""
        requests = self._by_connection.get(connection)
        return None if requests is None else requests.get(request_id)

    def of_connection(self, connection: bytes) -> list[RoutedRequest]:
        return list(self._by_connection.get(connection, {}).values())

    def named(self, session: str, request_id: int) -> RoutedRequest | None:
        """Return a request that goes on, or has ended a short while ago."""
        return self._by_name.get((session, request_id)) or self._ended.get((session, request_id))

    def add(self, routed: RoutedRequest) -> None:
        self._by_connection.setdefault(routed.connection, {})[routed.id] = routed
        if routed.is_resumable:
            self._ended.pop((routed.session, routed.id), None)
            self._by_name[routed.session, routed.id] = routed
        routed.last_sent_s = time.monotonic()
        self.in_flight.add(routed.account, len(routed.choices))
        self._count += 1

    def move(self, routed: RoutedRequest, connection: bytes) -> None:
        """Let a request belong to another connection of its client."""
        if routed.ended_s is not None:
            routed.connection = connection
            return
        self._take_out(routed)
        routed.connection = connection
        self.add(routed)

    def send(self, routed: RoutedRequest, message: ServerMessage) -> None:
        """Send the client of a request a message about it."""
        self.send_map(routed, to_map(message))

    def send_map(self, routed: RoutedRequest, values: Mapping[object, object] | Mapping[str, object]) -> bytes:
        """Send the client of a request the map of a message about it; return it as it was sent."""
        routed.last_sent_s = time.monotonic()
        body = cast("bytes", self._pack(values))
        self._front.send_body(routed.connection, body)
        return body

    def end(self, routed: RoutedRequest, last: Failed | dict[str, object]) -> None:
        """Send the last message and forget the request, in a while if its client may ask again."""
        if routed.ended_s is not None:
            return
        self.drop(routed)
        if routed.is_resumable:
            self._ended[routed.session, routed.id] = routed
            if len(self._ended) > KEEP_REQUESTS:
                self._ended.popitem(last=False)
        routed.last = self.send_map(routed, to_map(last) if isinstance(last, Failed) else last)

    def end_unknown(self, routed: RoutedRequest, last: Failed) -> None:
        """Send the answer to a `resume` of a request that could not be found."""
        if routed.ended_s is None:
            self.drop(routed)
            self._front.send(routed.connection, to_map(last))

    def drop(self, routed: RoutedRequest) -> None:
        """Forget a request without a word."""
        self._take_out(routed)
        routed.ended_s = time.monotonic()

    def _take_out(self, routed: RoutedRequest) -> None:
        requests = self._by_connection[routed.connection]
        del requests[routed.id]
        if not requests:
            del self._by_connection[routed.connection]
        if routed.is_resumable and self._by_name.get((routed.session, routed.id)) is routed:
            del self._by_name[routed.session, routed.id]
        self.in_flight.remove(routed.account, len(routed.choices))
        self._count -= 1

    def prune(self, now_s: float) -> None:
        """Forget what ended long ago."""
        while self._ended:
            name, oldest = next(iter(self._ended.items()))
            if now_s - (oldest.ended_s or 0.0) < KEEP_S:
                return
            del self._ended[name]
