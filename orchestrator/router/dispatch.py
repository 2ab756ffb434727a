"""Send requests to replicas: where most of the prompt is cached and least waits; again where a replica was lost."""

import logging
import secrets
import time
from array import array
from collections.abc import Sequence

from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.router.replica import SILENT_S, Replica
from mgpu.orchestrator.router.requests.part import Part
from mgpu.orchestrator.router.requests.relay import Relay
from mgpu.orchestrator.router.requests.routed_request import RoutedRequest
from mgpu.orchestrator.router.requests.table import RoutedTable
from mgpu.protocol.errors import DeadlineExceeded, MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.front.server_messages import Failed, Tokens, to_map

MAX_LOSSES = 3
"""A request that so many replicas were lost with may be what they die of."""
HOMELESS_S = 60.0
"""How long a request waits for any replica that takes it."""
_ELSEWHERE = frozenset({"stopped", "draining", "not_ready", "unknown_request", "slow_reader"})
"""Refusals of one replica that say nothing about another; it may have been started again at the same place."""

log = logging.getLogger(__name__)


class Dispatch:
    """Places requests, and passes on what replicas say about them."""

    def __init__(self, replicas: Sequence[Replica], table: RoutedTable) -> None:
        self._replicas = replicas
        self._table = table
        self._homeless: list[tuple[float, RoutedRequest, list[int]]] = []
        """(until when, request, choices): no replica takes them now."""
        self._parts: dict[RoutedRequest, dict[Part, Replica]] = {}
        """Where the choices of each request are made."""
        self.pass_on = Relay(table, self._on_begun, self._on_finished).take
        self.moved = 0
        """Requests that went on elsewhere because a replica was lost."""

    # ----------------------------------------------------------------- placing

    def begin(self, routed: RoutedRequest) -> None:
        """Send a new request to a replica. Refusal when none takes requests."""
        replica = self.choose(routed)
        if replica is None:
            raise Refusal("not_ready", self._why_none(), RETRY_AFTER_S)
        self._table.add(routed)
        indexes = list(range(len(routed.choices)))
        if not self._send(routed, indexes, replica):
            self._wait_for_home(routed, indexes)

    def choose(self, routed: RoutedRequest, avoid: Replica | None = None) -> Replica | None:
        """Return the replica that will probably be the first to have computed the prompt.

        One that is ready comes before one that recovers, and any other before ``avoid``.
        """
        best, least = None, (True, True, 0)
        for replica in self._replicas:
            if replica.takes_requests:
                cost = replica.load - (replica.prefixes.matched(routed.keys) if routed.keys else 0)
                rank = (not replica.is_ready, replica is avoid, cost)
                if best is None or rank < least:
                    best, least = replica, rank
        return best

    def _place(self, routed: RoutedRequest, indexes: list[int], avoid: Replica | None = None) -> None:
        """Begin a part for these choices, or one for each if some have begun."""
        is_new = routed.accepted is None or (
            len(indexes) == len(routed.choices) and not any(each.token_ids for each in routed.choices)
        )
        for group in [indexes] if is_new else [[index] for index in indexes]:
            if routed.ended_s is not None:
                return
            replica = self.choose(routed, avoid)
            if replica is None or not self._send(routed, group, replica):
                self._wait_for_home(routed, group)

    def _wait_for_home(self, routed: RoutedRequest, indexes: list[int]) -> None:
        self._homeless.append((time.monotonic() + HOMELESS_S, routed, indexes))

    def _send(self, routed: RoutedRequest, indexes: list[int], replica: Replica) -> bool:
        left_s = None if routed.deadline_s is None else routed.deadline_s - time.monotonic()
        try:
            message = routed.message_for(indexes, left_s)
            if replica.name in routed.lost_at:
                message["id"] = secrets.randbits(58) << 4
            part = Part(routed, indexes, message, self.on_error, self.pass_on)
            part.uncached_tokens = max(1, routed.prompt_size - replica.prefixes.matched(routed.keys))
            if not replica.begin(part):
                return False
        except RequestFailed as error:  # too large with what the router adds, or with what has been emitted
            is_new = routed.accepted is None
            how = Refusal("bad_request", str(error)) if is_new else None
            self.fail(routed, how or Refusal("engine_error", f"cannot go on elsewhere: {error}"))
            return True
        self.attach(part, replica)
        replica.prefixes.add(routed.keys)
        return True

    def attach(self, part: Part, replica: Replica) -> None:
        """Note that a replica makes a part."""
        self._parts.setdefault(part.routed, {})[part] = replica
        part.is_attached = True

    def _detach(self, part: Part) -> Replica | None:
        """Forget a part; return its replica, None if it was forgotten before."""
        parts = self._parts.get(part.routed, {})
        replica = parts.pop(part, None)
        if not parts:
            self._parts.pop(part.routed, None)
        if replica is not None:
            replica.forget(part)
        part.is_attached = False
        return replica

    def _why_none(self) -> str:
        states = ", ".join(
            f"{each.name} is {'held' if each.is_held else each.problem or each.state}" for each in self._replicas
        )
        return f"no replica takes requests now ({states or 'there are none'})"

    # ----------------------------------------------------------- from replicas

    def _on_begun(self, part: Part) -> None:
        """Note that the first token of a part has come."""
        self._parts[part.routed][part].note_begun(part)

    def _on_finished(self, part: Part, reasons: list[str], cached_tokens: int) -> None:
        """End the request when all of its choices have ended."""
        routed = part.routed
        self._detach(part)
        if 0 in part.indexes and not routed.cached_tokens:
            routed.cached_tokens = cached_tokens
        for index, reason in zip(part.indexes, reasons, strict=True):
            if routed.choices[index].finish_reason is None:
                routed.choices[index].finish_reason = reason
        if not routed.unfinished:
            self._table.end(routed, routed.finished())

    def on_error(self, part: Part, error: MgpuError) -> None:
        """End the request, or go on elsewhere."""
        replica = self._detach(part)
        if replica is not None:
            self._handle(error, part, replica)

    def _handle(self, error: MgpuError, part: Part, replica: Replica) -> None:
        routed, code = part.routed, error.code if isinstance(error, RequestFailed) else ""
        if isinstance(error, ServerUnreachable) or code in _ELSEWHERE:
            self._go_on_elsewhere(part, replica, str(error))
        elif isinstance(error, DeadlineExceeded):
            self.fail(routed, Failed(routed.id, "deadline_exceeded", str(error)))
        elif isinstance(error, RequestFailed):
            self.fail(routed, Failed(routed.id, code, str(error), error.retry_after_s))
        else:
            self.fail(routed, Failed(routed.id, "engine_error", str(error)))

    def _go_on_elsewhere(self, part: Part, replica: Replica, why: str) -> None:
        routed = part.routed
        if not routed.unfinished:  # only its last message was lost
            self._table.end(routed, routed.finished())
            return
        indexes = [index for index in part.indexes if routed.choices[index].finish_reason is None]
        if not indexes:
            return
        if not routed.message:
            text = "the replica of this request was lost, and so was the router that knew its prompt"
            self.fail(routed, Refusal("engine_error", text))
            return
        routed.losses += 1
        routed.lost_at.add(replica.name)
        if routed.losses > MAX_LOSSES:
            text = f"{routed.losses} replicas were lost with this request; it is not sent to another"
            self.fail(routed, Refusal("engine_error", text))
            return
        self.moved += 1
        log.debug("request %d goes on elsewhere than at %s: %s", routed.id, replica.name, why)
        self._place(routed, indexes, avoid=replica)

    # ------------------------------------------------------------------ endings

    def fail(self, routed: RoutedRequest, how: Refusal | Failed) -> None:
        """End a request with an error, on all replicas."""
        self.withdraw(routed)
        self._table.end(routed, how.answer(routed.id) if isinstance(how, Refusal) else how)

    def withdraw(self, routed: RoutedRequest) -> None:
        """Stop a request on all replicas."""
        for part, replica in self._parts.pop(routed, {}).items():
            part.is_attached = False
            replica.cancel(part)
        if self._homeless:
            self._homeless = [each for each in self._homeless if each[1] is not routed]

    def cancel(self, routed: RoutedRequest) -> None:
        """End a request for its client, with the tokens so far."""
        self.withdraw(routed)
        for index in routed.unfinished:
            last = to_map(Tokens(routed.id, index, "", [], None, "cancelled"))
            routed.note(index, array("i"), "cancelled", self._table.send_map(routed, last))
        self._table.end(routed, routed.finished())

    # ------------------------------------------------------------ periodic work

    def leave(self, replica: Replica, why: str) -> None:
        """Take all requests off a replica that is lost."""
        for part in list(replica.parts.values()):
            self._leave(part, replica, why)

    def _leave(self, part: Part, replica: Replica, why: str) -> None:
        is_ours = self._detach(part) is not None
        replica.cancel(part)
        if is_ours:
            self._go_on_elsewhere(part, replica, why)

    def run_periodic_work(self, now_s: float) -> None:
        """Leave lost replicas, and place what no replica took."""
        for replica in self._replicas:
            if replica.parts and replica.is_lost(now_s):
                log.warning("%s is lost; %d requests go on elsewhere", replica.name, len(replica.parts))
                self.leave(replica, "it is lost")
            elif replica.is_connected:
                for part in list(replica.parts.values()):
                    if now_s - part.request.heard_s > SILENT_S:
                        self._leave(part, replica, "it is silent")
        homeless, self._homeless = self._homeless, []
        for until_s, routed, indexes in homeless:
            if routed.ended_s is not None:
                continue
            if routed.deadline_s is not None and now_s >= routed.deadline_s:
                self.fail(routed, Refusal("deadline_exceeded", "not finished within timeout_s"))
                continue
            able = self.choose(routed)
            if able is not None and self._send(routed, indexes, able):
                continue
            if now_s > until_s:
                self.fail(routed, Refusal("not_ready", self._why_none(), RETRY_AFTER_S))
            else:
                self._homeless.append((until_s, routed, indexes))
