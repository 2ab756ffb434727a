"""Answers to health, models and stats; the last one asks the engine and must not wait for ever."""

import time

from mgpu.orchestrator.gateway.requests import RequestTable
from mgpu.orchestrator.gateway.tokenizer import TextCodec
from mgpu.protocol.link import EngineInfo, GatewaySpec, StatsReply
from mgpu.protocol.messages import Failed, Health, Models, Stats

STATS_TIMEOUT_S = 2.0


class PendingStats:
    """Stats queries that the engine has not answered yet."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[bytes, int, float]] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, client: bytes, request_id: int) -> int:
        """Note a client's query and give the number under which the engine is asked."""
        query_id, self._next = self._next, self._next + 1
        self._waiting[query_id] = (client, request_id, time.monotonic() + STATS_TIMEOUT_S)
        return query_id

    def answer(self, reply: StatsReply, table: RequestTable) -> tuple[bytes, Stats] | None:
        """Give the client and its answer; None when it has been given up."""
        waiting = self._waiting.pop(reply.query_id, None)
        if waiting is None:
            return None
        client, request_id, _ = waiting
        own = {"gateway_requests": float(len(table)), "gateway_sequences": float(table.num_sequences)}
        return client, Stats(request_id, {**reply.counters, **own})

    def take_overdue(self, now: float) -> list[tuple[bytes, Failed]]:
        """Give up on what has waited too long, and give what to tell each client."""
        overdue = [(query_id, *waiting) for query_id, waiting in self._waiting.items() if now >= waiting[2]]
        for query_id, *_ in overdue:
            del self._waiting[query_id]
        text = f"the engine did not answer within {STATS_TIMEOUT_S:g} s"
        return [(client, Failed(request_id, "not_ready", text)) for _, client, request_id, _ in overdue]


def health(query_id: int, spec: GatewaySpec, info: EngineInfo | None, in_flight: int, started_s: float) -> Health:
    """Say how the server is; ``info`` is None until it can take requests for the first time."""
    info = info or EngineInfo("starting", 0, 0, "")
    uptime_s = round(time.monotonic() - started_s, 3)
    limits = (info.max_seq_len, info.kv_tokens)
    return Health(query_id, info.state, spec.model_name, *limits, in_flight, uptime_s, info.layout)


def models(query_id: int, spec: GatewaySpec, info: EngineInfo | None, codec: TextCodec | None) -> Models:
    """List the one model that is served."""
    model = {
        "name": spec.model_name,
        "max_seq_len": info.max_seq_len if info else 0,
        "vocab_size": spec.vocab_size,
        "chat": codec is not None and codec.has_chat_template,
    }
    return Models(query_id, [model])
