"""Questions about the server: the engine is asked for one at a time, whatever clients ask."""

import itertools
from collections.abc import Iterator

import pytest

from harness.servers.gateway_process import GatewayProcess
from harness.servers.raw_peer import RawPeer
from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.requests.admission import ServedModel
from mgpu.orchestrator.gateway.requests.queries import ANSWER_AT_ONCE_S, ASK_PAUSE_S, ENGINE_TIMEOUT_S, Queries
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


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("mgpu.orchestrator.gateway.requests.queries.time.monotonic", found)
    return found


@pytest.fixture
def queries(sent: Sent, clock: Clock) -> Queries:
    spec = GatewaySpec("/run", "ipc:///front", "ipc:///link", "/model", "safetensors", "tiny", 300, [1], 1 << 20)
    model = ServedModel(spec, EngineInfo("ready", 512, 4096, ""), None, is_loaded=True)
    return Queries(model, RequestTable(Quota(ClientLimits())), sent, RequestTimes())  # type: ignore[arg-type]


ACCOUNT = Account("pid:1", "account")


def ask(queries: Queries, connection: bytes) -> None:
    queries.on_query(connection, ACCOUNT, Query("stats", 1))


def reply(queries: Queries, number: int, steps: float) -> None:
    queries.on_stats(StatsReply(number, {"steps": steps}))
    while queries.wait_s() == 0:
        queries.advance()


def test_questions_that_come_meanwhile_share_the_next_answer(queries: Queries, sent: Sent, clock: Clock) -> None:
    for number in range(100):
        ask(queries, b"%d" % number)
    assert len(sent.asked) == 1
    reply(queries, sent.asked[0], 1.0)
    assert sent.answers() == [(b"0", 1.0)], "no answer is older than its question"
    assert len(sent.asked) == 1
    assert queries.wait_s() == pytest.approx(ASK_PAUSE_S)
    clock.now_s += ASK_PAUSE_S
    queries.advance()
    assert len(sent.asked) == 2
    reply(queries, sent.asked[1], 2.0)
    assert sent.answers()[1:] == [(b"%d" % number, 2.0) for number in range(1, 100)]
    assert len(sent.asked) == 2, "nobody waits any more"
    clock.now_s += ASK_PAUSE_S
    ask(queries, b"new")
    reply(queries, sent.asked[2], 3.0)
    assert sent.answers()[-1] == (b"new", 3.0)


def test_a_flood_of_questions_has_the_engine_asked_some_times_a_second(
    queries: Queries, sent: Sent, clock: Clock
) -> None:
    for number in range(1000):
        clock.now_s += 0.001
        ask(queries, b"%d" % number)
        queries.on_stats(StatsReply(sent.asked[-1], {"steps": 1.0}))
        queries.advance()
    assert len(sent.asked) <= 1 / ASK_PAUSE_S + 1
    assert len(sent.to_clients) >= 1000 - 1000 * ASK_PAUSE_S - 1, "and all share the answers"


def test_answers_are_made_some_at_a_time_and_charged_to_who_asked(
    queries: Queries, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(
        "mgpu.orchestrator.gateway.requests.queries.time.perf_counter", lambda: next(ticks) * ANSWER_AT_ONCE_S / 10
    )
    ask(queries, b"first")
    for number in range(30):
        ask(queries, b"%d" % number)
    queries.on_stats(StatsReply(100, {"steps": 1.0}))
    assert queries.advance() == {ACCOUNT: pytest.approx(ANSWER_AT_ONCE_S)}
    assert len(sent.to_clients) == 10
    assert queries.wait_s() == 0
    queries.advance()
    assert len(sent.to_clients) == 20


def test_an_engine_that_was_silent_is_asked_again(queries: Queries, sent: Sent, clock: Clock) -> None:
    ask(queries, b"early")
    clock.now_s += ENGINE_TIMEOUT_S / 2
    ask(queries, b"late")
    queries.give_up_overdue(100.0 + ENGINE_TIMEOUT_S)
    assert [connection for connection, _ in sent.to_clients] == [b"early"]
    assert len(sent.asked) == 2, "the one that still waits is asked for"
    reply(queries, sent.asked[0], 1.0)  # comes late after all
    reply(queries, sent.asked[1], 2.0)
    assert sent.to_clients[-1][0] == b"late"
    queries.give_up_overdue(1e9)
    clock.now_s += ASK_PAUSE_S
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
