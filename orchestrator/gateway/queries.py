"""Answers to health, models and stats; the engine is asked, and must not be waited for for ever."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from mgpu.orchestrator.gateway.requests import RequestTable
from mgpu.orchestrator.gateway.tokenizer import TextCodec
from mgpu.protocol.link import EngineInfo, GatewaySpec, Resumed, StatsReply
from mgpu.protocol.messages import Health, Models, Query, ResumeRequest, Stats

ENGINE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Question:
    """What a client wants to know from the engine."""

    client: bytes
    message: Query | ResumeRequest
    overdue_s: float


class Questions:
    """Questions that the engine has not answered yet."""

    def __init__(self) -> None:
        self._waiting: dict[int, Question] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, client: bytes, message: Query | ResumeRequest) -> int:
        """Note a client's question and give the number under which the engine is asked."""
        number, self._next = self._next, self._next + 1
        self._waiting[number] = Question(client, message, time.monotonic() + ENGINE_TIMEOUT_S)
        return number

    def take(self, reply: StatsReply | Resumed) -> Question | None:
        """Give the question that is answered; None when it has been given up."""
        return self._waiting.pop(reply.query_id, None)

    def take_overdue(self, now: float) -> list[Question]:
        """Give up on what has waited too long."""
        overdue = {number: question for number, question in self._waiting.items() if now >= question.overdue_s}
        for number in overdue:
            del self._waiting[number]
        return list(overdue.values())


def stats(query_id: int, counters: Mapping[str, float], table: RequestTable) -> Stats:
    """Put the engine's counters and the gateway's own together."""
    own = {"gateway_requests": float(len(table)), "gateway_sequences": float(table.num_sequences)}
    return Stats(query_id, {**counters, **own})


def health(
    query_id: int,
    spec: GatewaySpec,
    info: EngineInfo | None,
    counters: Mapping[str, float],
    in_flight: int,
    started_s: float,
) -> Health:
    """Say how the server is; ``info`` is None until it can take requests for the first time."""
    info = info or EngineInfo("starting", 0, 0, "")
    return Health(
        query_id,
        "stalled" if counters.get("stalled") else info.state,
        spec.model_name,
        info.max_seq_len,
        info.kv_tokens,
        in_flight,
        round(time.monotonic() - started_s, 3),
        info.layout,
        running=int(counters.get("running", 0)),
        waiting=int(counters.get("waiting", 0)),
        last_step_age_s=round(counters.get("last_step_age_s", 0.0), 3),
        restarts=int(counters.get("restarts", 0)),
        last_recovery_s=round(counters.get("last_recovery_s", 0.0), 3),
    )


def models(query_id: int, spec: GatewaySpec, info: EngineInfo | None, codec: TextCodec | None) -> Models:
    """List the one model that is served."""
    model = {
        "name": spec.model_name,
        "max_seq_len": info.max_seq_len if info else 0,
        "vocab_size": spec.vocab_size,
        "chat": codec is not None and codec.has_chat_template,
    }
    return Models(query_id, [model])
