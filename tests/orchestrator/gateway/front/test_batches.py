"""Clients that read several messages at once get those of a turn as one; others notice nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from harness.waiting import eventually
from mgpu.orchestrator.gateway.front import socket as module
from mgpu.orchestrator.gateway.front.batches import MAX_BYTES, MAX_MESSAGES, Batches
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.protocol.front import framing
from mgpu.protocol.front.framing import unpack_batch

ONE, TWO = b"one", b"two"


class Sent:
    """Batches, and what was sent of them."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, list[dict[object, object]]]] = []
        self.batches = Batches(self._send)

    def _send(self, connection: bytes, body: bytes) -> None:
        self.sent.append((connection, unpack_batch([framing.VERSION, body])))

    def add(self, connection: bytes, number: int, text: str = "") -> None:
        self.batches.add(connection, msgpack.packb({"id": number, "text": text}))

    def numbers(self) -> list[tuple[bytes, list[object]]]:
        return [(connection, [each["id"] for each in batch]) for connection, batch in self.sent]


def test_each_connection_gets_its_own_in_order_and_once() -> None:
    sent = Sent()
    for number in range(4):
        sent.add((ONE, TWO)[number % 2], number)
    sent.batches.send()
    sent.batches.send()
    assert sent.numbers() == [(ONE, [0, 2]), (TWO, [1, 3])]


def test_a_batch_is_sent_before_it_is_too_large() -> None:
    sent = Sent()
    for number in range(3):
        sent.add(ONE, number, "x" * (MAX_BYTES // 2 - 100))
    sent.add(ONE, 3, "x" * (2 * MAX_BYTES))
    assert sent.numbers() == [(ONE, [0, 1]), (ONE, [2])]
    for number in range(MAX_MESSAGES + 5):
        sent.add(TWO, number)
    sent.batches.send()
    assert [len(numbers) for connection, numbers in sent.numbers() if connection == TWO] == [MAX_MESSAGES, 5]


def test_what_was_thrown_away_is_not_sent() -> None:
    sent = Sent()
    sent.add(ONE, 1)
    sent.add(TWO, 2)
    sent.batches.drop(ONE)
    sent.batches.send()
    assert sent.numbers() == [(TWO, [2])]


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(0)


class Pair:
    """A front socket and one peer of it."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", folder: Path) -> None:
        self.front = FrontSocket(context, f"ipc://{folder}/front", 1 << 20)
        self.peer = context.socket(zmq.DEALER)
        self.peer.connect(self.front.endpoint)
        self.peer.send_multipart(framing.pack({"id": 1}))
        self.connection = eventually(self._received)
        self.front.take_batches(self.connection)

    def _received(self) -> bytes:
        self.front.admit()
        self.front.begin_turn()
        received = self.front.receive()
        return b"" if received is None else received.connection

    def heard(self) -> list[Any]:
        assert self.peer.poll(20_000), "nothing came"
        return unpack_batch(self.peer.recv_multipart())


@pytest.fixture
def pair(context: "zmq.Context[zmq.Socket[bytes]]", tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(context, tmp_path)
    yield pair
    pair.front.close()


def test_messages_of_a_turn_are_one(pair: Pair) -> None:
    for number in range(3):
        pair.front.send(pair.connection, {"id": number})
    assert not pair.peer.poll(0), "the turn is not over"
    pair.front.send_batches()
    assert [each["id"] for each in pair.heard()] == [0, 1, 2]
    pair.front.send(pair.connection, {"id": 3})
    pair.front.flush()
    assert pair.heard() == [{"id": 3}]


def test_nothing_of_a_batch_follows_what_was_thrown_away(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a client that does not read would miss what is in the middle, and not be told."""
    monkeypatch.setattr(module, "MAX_BACKLOG_BYTES", 1000)
    with monkeypatch.context() as patched:
        patched.setattr(pair.front, "_try_send", lambda *_: False)
        for number in range(2):
            pair.front.send(pair.connection, {"id": number, "text": "x" * 2000})
            pair.front.send_batches()
        assert pair.connection in pair.front._lost
        pair.front.send(pair.connection, {"id": 2})
    assert pair.front.take_lost() == {pair.connection: "slow"}
    pair.front.send(pair.connection, {"id": 3})
    pair.front.flush()
    assert pair.heard() == [{"id": 3}]
    pair.front.send(pair.connection, {"id": 4})
    pair.front.drop_sender(pair.connection)
    assert pair.front.take_lost() == {pair.connection: "flooding"}
    pair.front.send(pair.connection, {"id": 5})
    pair.front.flush()
    assert pair.heard() == [{"id": 5}]
