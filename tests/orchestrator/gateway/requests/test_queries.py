"""Questions about the server: the engine is asked for one at a time, whatever clients ask."""

from collections.abc import Iterator

import pytest

from harness.gateway_process import GatewayProcess
from harness.raw_peer import RawPeer
from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.requests.admission import ServedModel
from mgpu.orchestrator.gateway.requests.queries import ENGINE_TIMEOUT_S, Queries
from mgpu.orchestrator.gateway.requests.quota import Quota
from mgpu.orchestrator.gateway.requests.request_times import RequestTimes
from mgpu.orchestrator.gateway.requests.table import RequestTable
from mgpu.protocol.front.client_messages import Query
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import EngineInfo, GatewaySpec, StatsQuery, StatsReply


class Sent:
    """What the gateway has sent."""

    def __init__(self) -> None:
        self.to_clients: list[tuple[bytes, object]] = []
        self.asked: list[int] = []

    def to_client(self, connection: bytes, message: object) -> None:
        self.to_clients.append((connection, message))

    def to_engine(self, message: object) -> None:
        assert isinstance(message, StatsQuery)
        self.asked.append(message.query_id)

    def answers(self) -> list[tuple[bytes, float]]:
        return [(connection, message.counters["steps"]) for connection, message in self.to_clients]  # type: ignore[attr-defined]


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def queries(sent: Sent) -> Queries:
    spec = GatewaySpec("/run", "ipc:///front", "ipc:///link", "/model", "safetensors", "tiny", 300, [1], 1 << 20)
    model = ServedModel(spec, EngineInfo("ready", 512, 4096, ""), None, is_loaded=True)
    return Queries(model, RequestTable(Quota(ClientLimits())), sent, RequestTimes())  # type: ignore[arg-type]


def ask(queries: Queries, connection: bytes) -> None:
    queries.on_query(connection, Account("pid:1", "account"), Query("stats", 1))


def test_questions_that_come_meanwhile_share_the_next_answer(queries: Queries, sent: Sent) -> None:
    for number in range(100):
        ask(queries, b"%d" % number)
    assert len(sent.asked) == 1
    queries.on_stats(StatsReply(sent.asked[0], {"steps": 1.0}))
    assert sent.answers() == [(b"0", 1.0)], "no answer is older than its question"
    assert len(sent.asked) == 2
    queries.on_stats(StatsReply(sent.asked[1], {"steps": 2.0}))
    assert sent.answers()[1:] == [(b"%d" % number, 2.0) for number in range(1, 100)]
    assert len(sent.asked) == 2, "nobody waits any more"
    ask(queries, b"new")
    queries.on_stats(StatsReply(sent.asked[2], {"steps": 3.0}))
    assert sent.answers()[-1] == (b"new", 3.0)


def test_an_engine_that_was_silent_is_asked_again(
    queries: Queries, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "mgpu.orchestrator.gateway.requests.queries.time.monotonic"
    now_s = 100.0
    monkeypatch.setattr(module, lambda: now_s)
    ask(queries, b"early")
    now_s += ENGINE_TIMEOUT_S / 2
    ask(queries, b"late")
    queries.give_up_overdue(100.0 + ENGINE_TIMEOUT_S)
    assert [connection for connection, _ in sent.to_clients] == [b"early"]
    assert len(sent.asked) == 2, "the one that still waits is asked for"
    queries.on_stats(StatsReply(sent.asked[0], {"steps": 1.0}))  # comes late after all
    queries.on_stats(StatsReply(sent.asked[1], {"steps": 2.0}))
    assert sent.to_clients[-1][0] == b"late"
    queries.give_up_overdue(1e9)
    ask(queries, b"again")
    assert len(sent.asked) == 3


@pytest.fixture
def peer(shared_gateway: GatewayProcess) -> Iterator[RawPeer]:
    peer = RawPeer(shared_gateway.endpoint)
    yield peer
    peer.close()


def test_a_flood_of_questions_is_answered_one_by_one(peer: RawPeer) -> None:
    for number in range(500):
        peer.say(type="stats", id=number)
    assert [peer.hear()["id"] for _ in range(500)] == list(range(500))
