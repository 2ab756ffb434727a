"""Answers to health, models and stats; the engine is asked, and must not be waited for for ever."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mgpu.orchestrator.gateway.requests.admission import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.requests.table import RequestTable
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.client_messages import Query, ResumeRequest
from mgpu.protocol.front.server_messages import Failed, Health, Models, ServerMessage, Stats
from mgpu.protocol.internal.gateway_messages import EngineInfo, GatewaySpec, Resume, Resumed, StatsQuery, StatsReply

ENGINE_TIMEOUT_S = 2.0
RECORD_TIMEOUT_S = 10.0
"""Longer: a client that resumes has waited already, and the engine may be busy with replacing its workers."""

MAX_QUESTIONS, MAX_QUESTIONS_OF_CLIENT = 8192, 1024
"""Questions that wait for the engine at the same time, of all and of one client; more if so many may resume."""
MAX_RECORDS_AT_ONCE = 32
"""Of these, portions of records that the engine is asked for at the same time; clients take turns.

What it says of other requests comes behind them. One has at most `journal.PORTION_TOKENS` and `PORTION_LOGPROB_BYTES`.
"""

EngineQuestion = StatsQuery | Resume
Name = tuple[str, int]
"""A client's own names of a request: session and id."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a client wants to know from the engine."""

    client: bytes
    owner: str
    """Whose it is; see `quota.owner_of`."""
    message: Query | ResumeRequest
    overdue_s: float
    known: tuple[int, ...] = ()
    """Of a record: what earlier portions have brought; see `link.Resume`."""
    is_stale: bool = False
    """The engine was asked for a client that has lost the request to this one since."""
    is_cancelled: bool = False
    """The client wants the request to end, as soon as it is known."""


class Queries:
    """Questions of clients, among them those that the engine has not answered yet."""

    def __init__(
        self,
        spec: GatewaySpec,
        table: RequestTable,
        send: Callable[[bytes, ServerMessage], None],
        send_engine: Callable[[EngineQuestion], None],
    ) -> None:
        self._spec = spec
        self._table = table
        self._send = send
        self._send_engine = send_engine
        self._waiting: dict[int, Question] = {}
        self._num_of_owner: Counter[str] = Counter()
        self._record_of: dict[Name, int] = {}
        """The question about each request; a second one takes the place of the first."""
        self._unsent: dict[str, deque[int]] = {}
        """Questions about records that wait, by owner; the first owner is next."""
        self._sent: set[int] = set()
        """Those that the engine has."""
        self._late: dict[int, ResumeRequest] = {}
        """Given up, and not answered by the engine either; the oldest are forgotten."""
        self._next = 1
        self._counters: dict[str, float] = {}
        """What the engine last said of itself."""
        self._started_s = time.monotonic()

    def __len__(self) -> int:
        return len(self._waiting)

    def on_query(
        self, client: bytes, owner: str, query: Query, info: EngineInfo | None, codec: TextCodec | None
    ) -> None:
        """Answer, or ask the engine first; ``info`` is None until it can take requests for the first time."""
        if query.kind == "models":
            self._send(client, models(query.id, self._spec, info, codec))
        elif query.kind == "health" and (info is None or info.state in ("starting", "stopped")):
            self._send_health(client, query.id, info, {})
        else:
            self._check_room(owner)
            question = Question(client, owner, query, time.monotonic() + ENGINE_TIMEOUT_S)
            self._send_engine(StatsQuery(self._note(question)))

    def ask_for_record(self, client: bytes, owner: str, message: ResumeRequest) -> None:
        """Ask the engine what it knows of a request, for the last client that wants it; `take` its answer.

        Refusal when too many questions wait.
        """
        number = self._record_of.get((message.session, message.id))
        old = None if number is None else self._waiting[number]
        if old is None or old.owner != owner:
            self._check_room(owner)
        if number is None or old is None:
            self._ask_record(Question(client, owner, message, time.monotonic() + RECORD_TIMEOUT_S))
            return
        _count_down(self._num_of_owner, old.owner)
        self._num_of_owner[owner] += 1
        self._waiting[number] = Question(client, owner, message, old.overdue_s, is_stale=number in self._sent)

    def ask_on(self, question: Question, known: tuple[int, ...] = ()) -> None:
        """Ask for the next portion of a record, in the place of a question that was answered."""
        overdue_s = time.monotonic() + RECORD_TIMEOUT_S
        self._ask_record(replace(question, overdue_s=overdue_s, known=known, is_stale=False))

    def cancel_record(self, client: bytes, owner: str, request_id: int) -> None:
        """Note that a client cancels a request that it waits to resume; nothing if there is none."""
        if not self._num_of_owner.get(owner):
            return
        for number, question in self._waiting.items():
            message = question.message
            if question.client == client and isinstance(message, ResumeRequest) and message.id == request_id:
                self._waiting[number] = replace(question, is_cancelled=True)

    def awaits_record(self, name: Name) -> bool:
        """Tell whether the engine has still to answer a question about the request of that session and id."""
        return name in self._record_of

    def _ask_record(self, question: Question) -> None:
        assert isinstance(question.message, ResumeRequest)
        number = self._note(question)
        self._record_of[question.message.session, question.message.id] = number
        self._unsent.setdefault(question.owner, deque()).append(number)
        self._send_records()

    def _send_records(self) -> None:
        while self._unsent and len(self._sent) < MAX_RECORDS_AT_ONCE:
            owner = next(iter(self._unsent))
            line = self._unsent.pop(owner)
            number = line.popleft()
            if line:
                self._unsent[owner] = line
            question = self._waiting.get(number)
            if question is not None and isinstance(message := question.message, ResumeRequest):
                self._sent.add(number)
                known, offsets = list(question.known), list(message.offsets)
                self._send_engine(Resume(number, message.session, message.id, known, offsets))

    def take(self, reply: StatsReply | Resumed) -> Question | None:
        """Give the question that is answered; None when it has been given up."""
        question = self._pop(reply.query_id)
        self._send_records()
        return question

    def take_late(self, reply: Resumed) -> ResumeRequest | None:
        """Give the message that is answered now that it has been given up."""
        return self._late.pop(reply.query_id, None)

    def on_stats(self, reply: StatsReply, info: EngineInfo | None) -> None:
        """Pass the engine's counters on to who asked for them."""
        self._counters = reply.counters
        question = self.take(reply)
        if question is None:
            return
        client, message = question.client, question.message
        if isinstance(message, Query) and message.kind == "health":
            self._send_health(client, message.id, info, reply.counters)
        else:
            self._send(client, stats(message.id, reply.counters, self._table))

    def give_up_overdue(self, now: float, info: EngineInfo | None) -> None:
        """Answer for an engine that does not."""
        overdue = {number: question for number, question in self._waiting.items() if now >= question.overdue_s}
        for number, question in overdue.items():
            was_sent = number in self._sent
            self._pop(number)
            client, message = question.client, question.message
            if isinstance(message, Query) and message.kind == "health":
                self._send_health(client, message.id, info, {**self._counters, "stalled": 1.0})
            else:
                timeout_s = RECORD_TIMEOUT_S if isinstance(message, ResumeRequest) else ENGINE_TIMEOUT_S
                text = f"the engine did not answer within {timeout_s:g} s"
                self._send(client, Failed(message.id, "not_ready", text, RETRY_AFTER_S))
            if isinstance(message, ResumeRequest):
                if not was_sent:  # the engine may run it for nobody; only its names are wanted, no tokens
                    nothing = [-1] * len(message.offsets)
                    self._send_engine(Resume(number, message.session, message.id, nothing, nothing))
                self._late[number] = message
        while len(self._late) > MAX_QUESTIONS:
            del self._late[next(iter(self._late))]
        self._send_records()

    def _check_room(self, owner: str) -> None:
        """Refusal when too many questions wait for the engine."""
        asked, limits = self._num_of_owner[owner], self._table.quota.limits
        most, most_of_all = max(MAX_QUESTIONS_OF_CLIENT, limits.client_requests), max(MAX_QUESTIONS, limits.sequences)
        if asked >= most or len(self._waiting) >= most_of_all:
            text = (
                f"{asked} questions of this client and {len(self._waiting)} of all wait for the engine, "
                f"the limits are {most} and {most_of_all}"
            )
            raise Refusal("overloaded", text, RETRY_AFTER_S)

    def _note(self, question: Question) -> int:
        """Give the number under which the engine is asked."""
        self._num_of_owner[question.owner] += 1
        number, self._next = self._next, self._next + 1
        self._waiting[number] = question
        return number

    def _pop(self, number: int) -> Question | None:
        question = self._waiting.pop(number, None)
        if question is not None:
            _count_down(self._num_of_owner, question.owner)
            if isinstance(question.message, ResumeRequest):
                del self._record_of[question.message.session, question.message.id]
                self._sent.discard(number)
        return question

    def _send_health(
        self, client: bytes, query_id: int, info: EngineInfo | None, counters: Mapping[str, float]
    ) -> None:
        info = info or EngineInfo("starting", 0, 0, "")
        health = Health(
            query_id,
            "stalled" if counters.get("stalled") else info.state,
            self._spec.model_name,
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
        )
        self._send(client, health)


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def stats(query_id: int, counters: Mapping[str, float], table: RequestTable) -> Stats:
    """Put the engine's counters and the gateway's own together."""
    own = {
        "gateway_requests": len(table),
        "gateway_sequences": table.quota.num_sequences,
        "gateway_queued_bytes": table.quota.queued_bytes,
    }
    return Stats(query_id, {**counters, **{name: float(value) for name, value in own.items()}})


def models(query_id: int, spec: GatewaySpec, info: EngineInfo | None, codec: TextCodec | None) -> Models:
    """List the one model that is served."""
    model = {
        "name": spec.model_name,
        "max_seq_len": info.max_seq_len if info else 0,
        "vocab_size": spec.vocab_size,
        "chat": codec is not None and codec.has_chat_template,
    }
    return Models(query_id, [model])
