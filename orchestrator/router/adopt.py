"""Find requests of an earlier router on the replicas, when their clients want to resume them.

A router that starts again knows nothing. Replicas know each request by a session and an id that follow from those of
its client, and go on with it for a while. So every replica is asked to resume it, and the one that can has it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.router.dispatch import Dispatch
from mgpu.orchestrator.router.replica import Replica
from mgpu.orchestrator.router.requests.part import Part
from mgpu.orchestrator.router.requests.routed_request import RoutedRequest
from mgpu.orchestrator.router.requests.table import RoutedTable
from mgpu.protocol.client.transport.resumable import RequestState
from mgpu.protocol.errors import MgpuError, RequestFailed
from mgpu.protocol.front.server_messages import Failed, Resumed

ANSWER_S = 10.0

_UNKNOWN = "no such request is known: it never arrived, or it ended too long ago"


@dataclass(slots=True, eq=False)
class _Search:
    routed: RoutedRequest
    offsets: list[int]
    until_s: float
    parts: dict[Part, Replica] = field(default_factory=dict)
    """Of the replicas that have not said that they do not know it."""
    other: RequestFailed | None = None
    """What a replica has said instead of not knowing it."""


class Adoption:
    """Asks replicas for requests that this router does not know."""

    def __init__(self, replicas: Sequence[Replica], table: RoutedTable, dispatch: Dispatch) -> None:
        self._replicas = replicas
        self._table = table
        self._dispatch = dispatch
        self._searches: list[_Search] = []

    def begin(self, routed: RoutedRequest, offsets: list[int]) -> None:
        """Look for a request. Refusal if no replica can be asked."""
        connected = [each for each in self._replicas if each.is_connected]
        if not connected:
            raise Refusal("not_ready", "no replica can be asked now", RETRY_AFTER_S)
        search = _Search(routed, offsets, time.monotonic() + ANSWER_S)
        self._table.add(routed)
        self._searches.append(search)
        for replica in connected:
            self._ask(search, replica)
        self._settle(search)

    def _ask(self, search: _Search, replica: Replica) -> None:
        routed = search.routed
        message = {"id": routed.upstream_id, "session": routed.session, "n": len(search.offsets)}

        def on_error(part: Part, error: MgpuError) -> None:
            if part in search.parts:
                self._on_answer(search, part, error)
            else:
                self._dispatch.on_error(part, error)

        part = Part(routed, list(range(len(search.offsets))), message, on_error, self._dispatch.pass_on)
        part.request.forbid_new()
        part.request.notify = lambda: self._on_progress(search, part)
        part.request.disconnect()
        assert replica.session is not None
        replica.session.requests[part.request.id] = part.request
        replica.session.channel.send(part.request.resume())
        replica.add(part)
        search.parts[part] = replica

    def _on_progress(self, search: _Search, part: Part) -> None:
        if part in search.parts and part.request.state is RequestState.RESUMED:
            replica = search.parts.pop(part)
            self._forget(search)
            routed = search.routed
            self._dispatch.attach(part, replica)
            self._table.send(routed, Resumed(routed.id, search.offsets))

    def _on_answer(self, search: _Search, part: Part, error: MgpuError) -> None:
        search.parts.pop(part).forget(part)
        if isinstance(error, RequestFailed) and error.code != "unknown_request":
            search.other = error
        self._settle(search)

    def _settle(self, search: _Search) -> None:
        if not search.parts and search in self._searches:
            self._forget(search)
            other = search.other or RequestFailed("unknown_request", _UNKNOWN)
            last = Failed(search.routed.id, other.code, str(other), other.retry_after_s)
            self._table.end_unknown(search.routed, last)

    def _forget(self, search: _Search) -> None:
        if search in self._searches:
            self._searches.remove(search)
        parts, search.parts = search.parts, {}
        for part, replica in parts.items():
            replica.cancel(part)

    def withdraw(self, routed: RoutedRequest) -> None:
        """Stop looking for a request."""
        for search in [each for each in self._searches if each.routed is routed]:
            self._forget(search)

    def run_periodic_work(self, now_s: float) -> None:
        """Tell clients to ask again whose requests no replica has told of in time."""
        for search in [each for each in self._searches if now_s > each.until_s]:
            self._forget(search)
            refusal = Refusal("not_ready", "the replicas did not answer in time", RETRY_AFTER_S)
            self._table.end_unknown(search.routed, refusal.answer(search.routed.id))
