"""Pass on what replicas say about requests: nearly all messages, so with few calls for each.

A message is decoded, checked as far as the router uses it, gets the ids that its client knows, and is encoded again.
What else a server says in it is passed on as it came, also fields that this version does not know.
"""

import time
from array import array
from collections.abc import Callable
from typing import cast

from mgpu.orchestrator.router.requests.part import Message, Part
from mgpu.orchestrator.router.requests.table import RoutedTable
from mgpu.protocol.client.transport.resumable import RequestState
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.server_messages import Accepted, parse_server_message

_RUNNING, _RESUMED = RequestState.RUNNING, RequestState.RESUMED


class Relay:
    """Between replicas and clients, while nothing special happens."""

    def __init__(
        self,
        table: RoutedTable,
        on_begun: Callable[[Part], None],
        on_finished: Callable[[Part, list[str], int], None],
    ) -> None:
        """``on_finished`` is called with the finish reasons and the number of cached tokens."""
        self._table = table
        self._on_begun = on_begun
        self._on_finished = on_finished

    def take(self, part: Part, data: Message) -> bool:
        """Pass a message on; False if it is none of an answer that goes on. FieldError for a malformed one."""
        request, kind = part.request, data.get("type")
        if not part.is_attached or (request.state is not _RUNNING and request.state is not _RESUMED):
            return False
        if kind == "tokens":
            self._pass_tokens(part, data)
        elif kind == "accepted":
            self._pass_accepted(part, data)
        elif kind != "finished" or not self._finish(part, data):
            return False
        request.heard_s = time.monotonic()
        return True

    def _pass_accepted(self, part: Part, data: Message) -> None:
        """Tell the client that its request is accepted, once."""
        accepted, routed = cast("Accepted", parse_server_message(data)), part.routed
        part.request.answer.accepted = accepted
        if routed.accepted is None:
            routed.accepted = accepted
            data["id"] = routed.id
            routed.accepted_body = self._table.send_map(routed, data)

    def _pass_tokens(self, part: Part, data: Message) -> None:
        index, reason = data.get("index"), data.get("finish_reason")
        token_ids = _token_ids(data)
        if (
            token_ids is None
            or type(index) is not int
            or not 0 <= index < len(part.indexes)
            or (reason is not None and type(reason) is not str)
        ):
            parse_server_message(data)
            raise FieldError(f"tokens of choice {index} do not fit a request of {len(part.indexes)} choices")
        if not part.has_tokens:
            self._on_begun(part)
        routed = part.routed
        data["id"], data["index"] = routed.id, part.indexes[index]
        routed.note(part.indexes[index], token_ids, reason, self._table.send_map(routed, data))

    def _finish(self, part: Part, data: Message) -> bool:
        """End the part; return False if an interruption is behind it, so that it goes on elsewhere."""
        reasons, cached = data.get("finish_reasons"), data.get("cached_tokens")
        if type(cached) is not int or type(reasons) is not list or len(reasons) != len(part.indexes):
            parse_server_message(data)
            raise FieldError(f"the server did not end {len(part.indexes)} choices")
        if not all(type(reason) is str for reason in reasons):
            parse_server_message(data)
        if part.request.state is _RESUMED and "cancelled" in reasons:
            return False
        part.request.close()
        self._on_finished(part, reasons, cached)
        return True


def _token_ids(data: Message) -> "array[int] | None":
    found = data.get("token_ids")
    if type(found) is not list or type(data.get("text")) is not str:
        return None
    try:
        return array("i", found)
    except (TypeError, OverflowError):
        return None
