"""What is read ahead of clients' messages: in turns by account, bounded, and never blind for others."""

import time
from collections import deque
from itertools import groupby
from types import SimpleNamespace

import pytest

from mgpu.orchestrator.gateway.front import inbox as module
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.front.inbox import FULL_BYTES, Inbox
from mgpu.orchestrator.gateway.front.socket import Received
from mgpu.protocol.front.framing import MAX_FRAMES

KEY = "key:abc"
MiB = 1 << 20


class FakeFront:
    """A ROUTER: hands out messages connection by connection."""

    def __init__(self) -> None:
        self.pipes: dict[bytes, deque[Received]] = {}
        self.dropped: list[bytes] = []
        self.left: set[bytes] = set()
        self.num_read = 0
        self.connections = self
        self.is_skipping = False

    def send(self, connection: bytes, nbytes: int = 10, count: int = 1, identity: str = KEY, owner: str = "") -> None:
        message = Received(connection, [b"x" * nbytes], identity, owner or identity)
        self.pipes.setdefault(connection, deque()).extend([message] * count)

    def receive(self) -> Received | None:
        for connection in list(self.pipes):
            pipe = self.pipes.pop(connection)
            if pipe:
                self.pipes[connection] = pipe  # behind all others
                self.num_read += 1
                return pipe.popleft()
        return None

    def begin_turn(self) -> None:
        pass

    def end_if_left(self, connection: bytes) -> bool:
        return connection in self.left

    def drop_sender(self, connection: bytes) -> None:
        self.dropped.append(connection)


@pytest.fixture
def front() -> FakeFront:
    return FakeFront()


@pytest.fixture
def laps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one lap follow the other without a pause."""
    monkeypatch.setattr(module, "MIN_PAUSE_S", 0.0)
    monkeypatch.setattr(module, "MAX_PAUSE_S", 0.0)


class Reader:
    """An inbox whose messages cost nothing but what a test says, and what it has handled."""

    def __init__(self, front: FakeFront) -> None:
        self.handled: list[Received] = []
        self.cost_s = 0.0
        self.inbox = Inbox(front, FairTurns(), self._handle)  # type: ignore[arg-type]

    def _handle(self, received: Received) -> None:
        self.handled.append(received)
        end_s = time.perf_counter() + self.cost_s
        while time.perf_counter() < end_s:
            pass

    def serve(self, count: int) -> list[Received]:
        """Handle one message after the other."""
        before = len(self.handled)
        for _ in range(count):
            self.inbox.serve(1e-9)
        return self.handled[before:]


@pytest.fixture
def reader(front: FakeFront) -> Reader:
    return Reader(front)


@pytest.mark.usefixtures("laps")
def test_an_account_with_many_connections_gains_nothing(front: FakeFront, reader: Reader) -> None:
    for number in range(50):
        front.send(b"many %d" % number, count=100)
    front.send(b"one", count=100, identity="key:other")
    reader.cost_s = 0.0005
    from_one = sum(message.connection == b"one" for message in reader.serve(60))
    assert from_one >= 15, "its messages come up in every lap of the others, and are served at once"


@pytest.mark.usefixtures("laps")
def test_a_process_that_connects_again_and_again_gains_nothing(front: FakeFront, reader: Reader) -> None:
    reader.cost_s = 0.0005
    front.send(b"honest", count=100, identity="uid:0", owner="pid:2")
    handled = []
    for number in range(60):
        for again in range(5):
            front.send(b"hostile %d %d" % (number, again), count=3, identity="uid:0", owner="pid:1")
        handled += reader.serve(1)
    assert sum(message.owner == "pid:2" for message in handled) >= 15


@pytest.mark.usefixtures("laps")
def test_a_message_behind_a_flood_is_served_within_a_lap(front: FakeFront, reader: Reader) -> None:
    for number in range(20):
        front.send(b"flood %d" % number, MiB, count=10)
    reader.serve(1)
    front.send(b"honest", identity="key:other")
    assert b"honest" in {message.connection for message in reader.serve(25)}


def test_nothing_is_read_ahead_of_an_account_that_has_enough_here(
    front: FakeFront, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_PAUSE_S", 1000.0)
    monkeypatch.setattr(module, "MAX_PAUSE_S", 1000.0)
    front.send(b"flood", FULL_BYTES // 8, count=1000)
    assert len(reader.serve(100)) == 100
    assert front.num_read <= 100 + 32
    assert not front.dropped


@pytest.mark.usefixtures("laps")
def test_a_flood_that_piles_up_is_dropped_with_its_connections_alone(front: FakeFront, reader: Reader) -> None:
    for number in range(20):
        front.send(b"flood %d" % number, MiB // 2, count=500, identity="key:flood")
    reader.cost_s = 0.002
    for _ in range(500):
        front.send(b"honest", identity="key:other")
        reader.serve(1)
        if front.dropped:
            break
    assert front.dropped
    assert b"honest" not in front.dropped
    front.pipes.clear()
    front.send(b"honest", identity="key:other")
    assert b"honest" in {message.connection for message in reader.serve(5)}
    del reader.handled[:]
    reader.cost_s = 0.0
    reader.inbox.serve(10.0)
    assert front.dropped[-1] not in {message.connection for message in reader.handled}, "what it had sent is void"


@pytest.mark.usefixtures("laps")
def test_of_many_floods_together_the_largest_is_dropped(
    front: FakeFront, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TOTAL_BYTES", 8 * MiB)
    for number in range(5):
        front.send(b"largest %d" % number, MiB, identity="key:1")
    for number in range(7):
        front.send(b"other %d" % number, MiB, identity=f"key:other {number}")
    monkeypatch.setattr(module, "READ_AT_ONCE_S", 10.0)
    reader.inbox.serve(10.0)
    assert sorted(front.dropped) == [b"largest %d" % number for number in range(5)]
    assert len(reader.handled) == 7


def test_a_connection_whose_messages_were_dropped_can_send_again(front: FakeFront, reader: Reader) -> None:
    front.send(b"flood", 17 * MiB)
    assert not reader.serve(1)
    assert front.dropped == [b"flood"]
    front.send(b"flood")
    assert len(reader.serve(1)) == 1


def test_a_turn_ends_after_its_time_whatever_waits(front: FakeFront, reader: Reader) -> None:
    front.send(b"flood", count=100)
    reader.cost_s = 0.005
    reader.inbox.serve(0.012)
    assert len(reader.handled) <= 3
    assert reader.inbox, "the loop must not sleep now"


def test_skipping_the_frames_of_a_message_is_charged_to_its_sender(front: FakeFront, reader: Reader) -> None:
    frames = [b"x"] * (MAX_FRAMES + 1)
    front.pipes[b"bad"] = deque([Received(b"bad", frames, "key:bad", "key:bad")] * 2)
    reader.serve(1)
    receive = front.receive

    def skip_and_receive() -> Received | None:
        end_s = time.perf_counter() + 0.01
        while time.perf_counter() < end_s:
            pass
        return receive()

    front.receive = skip_and_receive  # type: ignore[method-assign]
    front.pipes.clear()
    front.send(b"honest", identity="key:other")
    reader.serve(1)
    front.receive = receive  # type: ignore[method-assign]
    for name in (b"bad", b"honest"):
        front.send(name, count=3, identity="key:bad" if name == b"bad" else "key:other")
    assert [message.connection for message in reader.serve(3)] == [b"honest"] * 3


def test_what_a_flood_has_left_behind_is_read_and_dropped(front: FakeFront, reader: Reader) -> None:
    for number in range(50):
        front.send(b"gone %d" % number, FULL_BYTES, owner="pid:1")
        front.left.add(b"gone %d" % number)
    front.send(b"here", owner="pid:1")
    front.send(b"other", owner="pid:2")
    front.left.add(b"other")
    served = [each.connection for each in reader.serve(60)]
    assert {b"here", b"other"} <= set(served), "a little of an owner is served without asking"
    assert sum(each.startswith(b"gone") for each in served) <= 1


def test_what_comes_from_an_ended_connection_is_not_served(front: FakeFront, reader: Reader) -> None:
    front.send(b"a", count=3)
    front.pipes[b"a"][1] = front.pipes[b"a"][1]._replace(is_open=False)
    assert len(reader.serve(4)) == 2


def test_an_account_has_the_turn_for_a_quantum_and_pays_for_all_of_it(
    front: FakeFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, order = 1.0, list[bytes]()

    def handle(received: Received) -> None:
        nonlocal now_s
        now_s += 0.001
        order.append(received.connection)

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now_s, monotonic=lambda: now_s))
    inbox = Inbox(front, FairTurns(), handle, quantum_s=0.0035)  # type: ignore[arg-type]
    for name in (b"a", b"b"):
        front.send(name, count=40, identity=f"key:{name.decode()}")
    inbox.serve(1.0)
    rows = [len(list(row)) for _, row in groupby(order)]
    assert rows == [4] * 20


def test_while_others_wait_only_those_who_may_are_handled(front: FakeFront, reader: Reader) -> None:
    front.send(b"flood", count=20, identity="key:flood")
    front.send(b"modest", count=3, identity="key:modest")
    reader.inbox.serve(10.0, lambda owner: owner == "key:modest")
    assert [each.connection for each in reader.handled] == [b"modest"] * 3
    assert reader.inbox, "the others wait here"
    reader.inbox.serve(10.0)
    assert len(reader.handled) == 23


def test_what_each_owner_has_cost_is_told(front: FakeFront) -> None:
    costs: dict[str, float] = {}

    def charge(owner: str, seconds: float) -> None:
        costs[owner] = costs.get(owner, 0.0) + seconds

    inbox = Inbox(front, FairTurns(), lambda _received: None, charge=charge)  # type: ignore[arg-type]
    front.send(b"many", count=1000, identity="key:many")
    front.send(b"one", identity="key:one")
    inbox.serve(10.0)
    assert costs["key:many"] > costs["key:one"] > 0


def test_the_inbox_is_behind_while_messages_are_left(front: FakeFront, reader: Reader) -> None:
    reader.cost_s = 0.002
    front.send(b"a", count=20)
    reader.inbox.serve(0.003)
    assert reader.inbox.is_behind
    reader.inbox.serve(10.0)
    assert not reader.inbox.is_behind
    front.is_skipping = True
    reader.inbox.serve(10.0)
    assert reader.inbox.is_behind, "nobody is heard before the rest of a message is skipped"
