"""Questions of clients: about the server from what the replicas last said, about text by asking a replica."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mgpu import __version__
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.router.dispatch import Dispatch
from mgpu.orchestrator.router.replica import Replica
from mgpu.orchestrator.router.requests.table import RoutedTable
from mgpu.protocol.errors import MgpuError, RequestFailed
from mgpu.protocol.front.client_messages import Detokenize, Query, Tokenize
from mgpu.protocol.front.server_messages import (
    Detokenized,
    Failed,
    Health,
    Models,
    ServerMessage,
    Stats,
    Tokenized,
    to_map,
)

ANSWER_S = 60.0
"""How long a replica may take for a question about text."""
MAX_QUESTIONS = 1024
_STATES = ("ready", "recovering", "stalled", "draining", "starting", "stopped")
"""The best first: the router is as good as its best replica."""


@dataclass(slots=True)
class _Question:
    connection: bytes
    id: int
    is_tokenize: bool
    replica: Replica
    number: int
    """By which the replica knows it."""
    until_s: float


class Questions:
    """Answers everything that is no generation."""

    def __init__(self, replicas: Sequence[Replica], table: RoutedTable, dispatch: Dispatch, front: FrontSocket) -> None:
        self._replicas = replicas
        self._table = table
        self._dispatch = dispatch
        self._front = front
        self._started_s = time.monotonic()
        self._open: list[_Question] = []
        self.state = ""
        """Set while the router itself drains or stops."""
        self.own: dict[str, float] = {}
        """Further counters."""

    # ------------------------------------------------------- about the server

    def answer(self, connection: bytes, query: Query) -> None:
        """Answer from what the replicas last said. Refusal for models before any replica is known."""
        message: ServerMessage
        if query.kind == "health":
            message = self._health(connection, query.id)
        elif query.kind == "stats":
            message = Stats(query.id, self._counters())
        else:
            known = next((each.models for each in self._replicas if each.models), None)
            if known is None:
                raise Refusal("not_ready", "no replica has said yet what it serves", RETRY_AFTER_S)
            message = Models(query.id, known)
        self._front.send(connection, to_map(message))

    def _health(self, connection: bytes, request_id: int) -> Health:
        known = [each.health for each in self._replicas if each.health is not None and each.is_connected]
        states = [health.state for health in known]
        state = self.state or next((each for each in _STATES if each in states), "starting")
        connections, own_connections = self._front.connections.count_for(connection)
        return Health(
            request_id,
            state,
            known[0].model if known else "",
            min((each.max_seq_len for each in known), default=0),
            sum(each.kv_tokens for each in known),
            len(self._table),
            round(time.monotonic() - self._started_s, 3),
            "\n\n".join(self._described(each) for each in self._replicas),
            running=sum(each.running for each in known),
            waiting=sum(each.waiting for each in known),
            last_step_age_s=min((each.last_step_age_s for each in known), default=0.0),
            restarts=sum(each.restarts for each in known),
            last_recovery_s=max((each.last_recovery_s for each in known), default=0.0),
            version=__version__,
            connections=connections,
            own_connections=own_connections,
        )

    def _described(self, replica: Replica) -> str:
        held = ", gets no new requests" if replica.is_held else ""
        problem = f" ({replica.problem})" if replica.problem else ""
        head = f"{replica.name}: {replica.state}{held}, {len(replica.parts)} requests{problem}"
        return head if replica.health is None else f"{head}\n{replica.health.layout}"

    def _counters(self) -> dict[str, float]:
        """Return the sums over replicas, and under ``NAME_`` what each has."""
        sums: Counter[str] = Counter()
        for replica in self._replicas:
            sums.update({name: value for name, value in replica.counters.items() if not name.startswith("gpu")})
        own = {
            f"{replica.name}_{name}": value for replica in self._replicas for name, value in replica.counters.items()
        }
        routed = {f"{each.name}_requests": float(len(each.parts)) for each in self._replicas}
        routed |= {f"{each.name}_ready": float(each.takes_requests) for each in self._replicas}
        mine = {
            "router_requests": float(len(self._table)),
            "router_moved": float(self._dispatch.moved),
            "replicas": float(len(self._replicas)),
            "replicas_ready": float(sum(each.takes_requests for each in self._replicas)),
        }
        return {**sums, **own, **routed, **mine, **self.own}

    # --------------------------------------------------------------- about text

    def ask(self, connection: bytes, query: Tokenize | Detokenize, message: dict[str, object]) -> None:
        """Ask the replica that has least to do. Refusal if none can be asked."""
        able = [each for each in self._replicas if each.is_connected and each.session is not None]
        if not able:
            raise Refusal("not_ready", "no replica can be asked now", RETRY_AFTER_S)
        if len(self._open) >= MAX_QUESTIONS:
            raise Refusal("overloaded", f"{len(self._open)} questions about text wait for the replicas", RETRY_AFTER_S)
        replica = min(able, key=lambda each: (each.state != "ready", each.load))
        assert replica.session is not None
        try:
            number = replica.session.ask({**message, "id": replica.new_id()})
        except RequestFailed as error:
            raise Refusal("bad_request", str(error)) from None
        except MgpuError as error:
            raise Refusal("not_ready", str(error), RETRY_AFTER_S) from None
        until_s = time.monotonic() + ANSWER_S
        self._open.append(_Question(connection, query.id, isinstance(query, Tokenize), replica, number, until_s))

    def is_open(self, connection: bytes, request_id: int) -> bool:
        """Return whether a question of this id waits."""
        return bool(self._open) and any(each.connection == connection and each.id == request_id for each in self._open)

    def cancel(self, connection: bytes, request_id: int | None = None) -> None:
        """Drop a question, or all of a connection; a question that is dropped by name is answered."""
        for question in [each for each in self._open if each.connection == connection]:
            if request_id in (None, question.id):
                self._forget(question)
                if request_id is not None:
                    cancelled = Refusal("bad_request", "the question was cancelled").answer(question.id)
                    self._front.send(connection, to_map(cancelled))

    def _forget(self, question: _Question) -> None:
        self._open.remove(question)
        if question.replica.session is not None:
            question.replica.session.forget(question.number)

    def pass_on(self, now_s: float) -> None:
        """Send the answers that have come."""
        for question in list(self._open):
            session = question.replica.session
            if session is not None and session.has_reply(question.number):
                self._open.remove(question)
                try:
                    if question.is_tokenize:
                        reply: ServerMessage = session.take_reply(question.number, Tokenized)
                    else:
                        reply = session.take_reply(question.number, Detokenized)
                    values = to_map(reply) | {"id": question.id}
                except MgpuError as error:
                    code = error.code if isinstance(error, RequestFailed) else "engine_error"
                    after_s = error.retry_after_s if isinstance(error, RequestFailed) else None
                    values = to_map(Failed(question.id, code, str(error), after_s))
                self._front.send(question.connection, values)
            elif session is None or not question.replica.is_connected or now_s > question.until_s:
                self._forget(question)
                text = f"{question.replica.name} did not answer"
                self._front.send(question.connection, to_map(Failed(question.id, "not_ready", text, RETRY_AFTER_S)))
