"""Answer health, stats and models. For two of them the engine is asked, which may not answer.

The engine has one question at a time, and some each second, whatever clients ask: an answer costs it a millisecond in
which it plans no step. All that wait share the next answer. They are answered some at a time, and charged for it.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mgpu import __version__
from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.requests.admission import ServedModel
from mgpu.orchestrator.gateway.requests.outgoing import Outgoing
from mgpu.orchestrator.gateway.requests.request_times import RequestTimes
from mgpu.orchestrator.gateway.requests.table import RequestTable
from mgpu.protocol.front.client_messages import Query
from mgpu.protocol.front.server_messages import Health, Models, Stats
from mgpu.protocol.internal.gateway_messages import StatsQuery, StatsReply

ENGINE_TIMEOUT_S = 2.0
ASK_PAUSE_S = 0.03
"""Between two questions to the engine. Who asks after a quiet while does not wait."""
ANSWER_AT_ONCE_S = 0.002
"""Spent on answers in one turn of the gateway's loop."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A query that waits for the engine."""

    connection: bytes
    account: Account
    query: Query
    overdue_s: float


class Queries:
    """Queries of clients, among them those that wait for the engine's counters."""

    def __init__(
        self,
        model: ServedModel,
        table: RequestTable,
        outgoing: Outgoing,
        times: RequestTimes,
        count_connections: Callable[[bytes], tuple[int, int]] = lambda _connection: (0, 0),
    ) -> None:
        """``count_connections`` returns the number of all, and of those with the same owner as the one that asks."""
        self._count_connections = count_connections
        self._model = model
        self._table = table
        self._quota = table.quota
        self._outgoing = outgoing
        self._times = times
        self._waiting: dict[int, _Question] = {}
        self._next_query = 1
        self._asked: int | None = None
        """The query for which the engine has been asked last, and has not answered."""
        self._next_ask_s = 0.0
        self._answerable: deque[_Question] = deque()
        """The engine has answered since they came."""
        self._counters: dict[str, float] = {}
        """The engine's last ones."""
        self._all_counters: dict[str, float] = {}
        """With those of this process."""
        self._started_s = time.monotonic()

    def on_query(self, connection: bytes, account: Account, query: Query) -> None:
        """Answer at once, or ask the engine. Refusal when too many questions wait for it."""
        if query.kind == "models":
            self._outgoing.to_client(connection, self._models(query))
        elif query.kind == "health" and self._model.public_info.state in ("starting", "stopped"):
            self._outgoing.to_client(connection, self._health(connection, query, {}))
        else:
            self._quota.check_question(account)
            self._quota.count_question(account)
            number, self._next_query = self._next_query, self._next_query + 1
            self._waiting[number] = _Question(connection, account, query, time.monotonic() + ENGINE_TIMEOUT_S)
            self._ask()

    def _ask(self) -> None:
        """Ask the engine for its counters, for all that wait, unless it has been asked a moment ago."""
        now_s = time.monotonic()
        if self._asked is None and self._waiting and now_s >= self._next_ask_s:
            self._next_ask_s = now_s + ASK_PAUSE_S
            self._asked = max(self._waiting)
            self._outgoing.to_engine(StatsQuery(self._asked))

    def on_stats(self, reply: StatsReply) -> None:
        """Have the queries answered that were there when the engine was asked: no answer is older than its query."""
        self._counters = reply.counters
        self._all_counters = {**reply.counters, **self._own_counters()}
        for number in [number for number in self._waiting if number <= reply.query_id]:
            self._answerable.append(self._waiting.pop(number))
        if reply.query_id == self._asked:
            self._asked = None

    def wait_s(self) -> float:
        """Return how long `advance` has nothing to do."""
        if self._answerable:
            return 0.0
        if self._asked is not None or not self._waiting:
            return math.inf
        return max(0.0, self._next_ask_s - time.monotonic())

    def advance(self) -> dict[Account, float]:
        """Answer for a moment, and ask the engine again if it is time. Return the seconds that each account has cost.

        Call it in every turn.
        """
        costs: dict[Account, float] = {}
        began_s = now_s = time.perf_counter()
        while self._answerable and now_s - began_s < ANSWER_AT_ONCE_S:
            question, since_s = self._answerable.popleft(), now_s
            self._answer(question)
            now_s = time.perf_counter()
            costs[question.account] = costs.get(question.account, 0.0) + now_s - since_s
        self._ask()
        return costs

    def _answer(self, question: _Question) -> None:
        self._quota.count_question(question.account, -1)
        connection, query = question.connection, question.query
        answer: Health | Stats
        if query.kind == "health":
            answer = self._health(connection, query, self._counters)
        else:
            answer = Stats(query.id, self._all_counters)
        self._outgoing.to_client(connection, answer)

    def give_up_overdue(self, now: float) -> None:
        """Answer in place of an engine that does not: it is stalled."""
        overdue = {number: question for number, question in self._waiting.items() if now >= question.overdue_s}
        for number, question in overdue.items():
            del self._waiting[number]
            self._quota.count_question(question.account, -1)
            query = question.query
            if query.kind == "health":
                stalled = self._health(question.connection, query, {**self._counters, "stalled": 1.0})
                self._outgoing.to_client(question.connection, stalled)
            else:
                text = f"the engine did not answer within {ENGINE_TIMEOUT_S:g} s"
                refusal = Refusal("not_ready", text, RETRY_AFTER_S)
                self._outgoing.to_client(question.connection, refusal.answer(query.id))
        if self._asked in overdue:
            self._asked, self._next_ask_s = None, 0.0
            self._ask()

    def _health(self, connection: bytes, query: Query, counters: Mapping[str, float]) -> Health:
        info = self._model.public_info
        connections, own_connections = self._count_connections(connection)
        return Health(
            query.id,
            "stalled" if counters.get("stalled") else info.state,
            self._model.spec.model_name,
            info.max_seq_len,
            info.kv_tokens,
            len(self._table),
            round(time.monotonic() - self._started_s, 3),
            info.layout,
            running=int(counters.get("running", 0)),
            waiting=int(counters.get("waiting", 0)),
            last_step_age_s=round(counters.get("last_step_age_s", 0.0), 3),
            restarts=int(counters.get("restarts", 0)),
            last_recovery_s=round(counters.get("last_recovery_s", 0.0), 3),
            version=__version__,
            connections=connections,
            own_connections=own_connections,
        )

    def _own_counters(self) -> dict[str, float]:
        own = {
            "gateway_clients": self._quota.num_clients,
            "gateway_requests": len(self._table),
            "gateway_sequences": self._quota.num_sequences,
            "gateway_queued_bytes": self._quota.queued_bytes,
        }
        return {**{name: float(value) for name, value in own.items()}, **self._times.counters()}

    def _models(self, query: Query) -> Models:
        """List the one model that is served."""
        spec, codec = self._model.spec, self._model.codec
        model: dict[str, object] = {
            "name": spec.model_name,
            "max_seq_len": self._model.public_info.max_seq_len,
            "vocab_size": spec.vocab_size,
            "chat": codec is not None and codec.has_chat_template,
        }
        formats = self._model.detected_format
        named = (("tool_format", formats.tools), ("reasoning_format", formats.reasoning))
        model |= {name: value for name, value in named if value}
        return Models(query.id, [model])
