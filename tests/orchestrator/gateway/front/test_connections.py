"""The open connections of the front channel: counted by owner, bounded, and ended without harm to others."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from harness.servers.gateway_process import GatewayProcess, assert_serves
from harness.servers.raw_peer import RawPeer
from harness.servers.zmtp_flood import GREETING, raw_connection
from harness.waiting import eventually
from mgpu.orchestrator.gateway.front import connections as module
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.gateway.front.transport.open_connection import OpenConnection, excess
from mgpu.protocol.front import framing


class Front:
    """A front socket whose loop is the test."""

    def __init__(self, endpoint: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = FrontSocket(self.context, endpoint, 1 << 20)
        self.connections = self.socket.connections
        self.received: list[bytes] = []
        self.num_accepted = 0
        self.peers: list[zmq.Socket[bytes]] = []

    def turn_without_reading(self) -> bool:
        self.socket.admit()
        self.num_accepted += self.connections.take_accepted()
        return True

    def turn(self) -> bool:
        self.socket.admit()
        self.socket.begin_turn()
        while (received := self.socket.receive()) is not None:
            self.received.append(received.connection)
        return True

    def run_until(self, count: int, reads: bool = True) -> None:
        """Take turns until so many connections are open."""
        turn = self.turn if reads else self.turn_without_reading
        eventually(lambda: turn() and len(self.connections) == count, lambda: len(self.connections))

    def dealer(self, routing_id: bytes = b"", speaks: bool = True) -> "zmq.Socket[bytes]":
        peer = self.context.socket(zmq.DEALER)
        self.peers.append(peer)
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.RECONNECT_IVL, -1)
        if routing_id:
            peer.setsockopt(zmq.ROUTING_ID, routing_id)
        peer.connect(self.socket.endpoint)
        if speaks:
            peer.send_multipart(framing.pack({"id": 1}))
        return peer


@pytest.fixture(params=["ipc", "tcp"])
def front(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Front]:
    found = Front(f"ipc://{tmp_path}/front" if request.param == "ipc" else "tcp://127.0.0.1:0")
    yield found
    for peer in found.peers:
        peer.close()
    found.socket.close()
    found.context.destroy(0)


def test_connections_are_counted_by_owner_while_they_are_open(front: Front) -> None:
    peers = [front.dealer() for _ in range(3)]
    eventually(lambda: front.turn() and len(front.received) == 3)
    owner = f"pid:{os.getpid()}" if front.socket.endpoint.startswith("ipc") else "127.0.0.1"
    assert {front.connections.owner_of(name) for name in front.received} == {owner}
    assert front.connections.count_for(front.received[0]) == (3, 3)
    peers.pop().close()
    front.run_until(2)
    for peer in peers:
        peer.close()
    front.run_until(0)
    assert front.connections.count_for(front.received[0]) == (0, 0)


def test_every_message_tells_its_owner_also_after_its_connection_has_ended(front: Front) -> None:
    owner = f"pid:{os.getpid()}" if front.socket.endpoint.startswith("ipc") else "127.0.0.1"
    for _ in range(20):
        front.dealer().close(linger=30_000)
    eventually(lambda: front.turn_without_reading() and front.num_accepted == 20)
    front.run_until(0, reads=False)
    front.socket.begin_turn()
    received = [front.socket.receive() for _ in range(20)]
    assert [each and (each.owner, each.is_open) for each in received] == [(owner, False)] * 20


def test_what_another_has_left_behind_under_the_same_descriptor_ends_no_connection(front: Front) -> None:
    """libzmq hands out the rest of a connection after its descriptor was given to the next one."""

    class Frame:
        def get(self, _name: str) -> str:
            return str(found.fd)

    front.dealer()
    eventually(lambda: front.turn() and front.received)
    [found] = front.connections._by_name.values()
    front.connections.max_of_key = 0
    assert front.connections.introduce(b"before", Frame(), found.origin, "key:flood")  # type: ignore[arg-type]
    assert found.end_at_s is None


def test_a_peer_that_has_left_is_ended_before_its_messages_are_read(front: Front) -> None:
    peer = front.dealer()
    eventually(lambda: front.turn() and front.received)
    [name] = front.received
    assert not front.connections.end_if_left(name)
    for _ in range(900):  # more than libzmq reads ahead, so that the end of the connection lies behind them
        peer.send_multipart([framing.VERSION, b"x" * 10])
    peer.close(linger=3_000)
    eventually(lambda: front.turn_without_reading() and front.connections.end_if_left(name))
    assert not front.connections.owner_of(name)
    assert front.connections.end_if_left(name), "what it had sent before is of no use any more"
    eventually(lambda: front.turn() and not front.connections._closing)
    if front.socket.endpoint.startswith("tcp"):
        assert len(front.received) < 600, "the kernel has dropped the rest"


def test_who_fills_the_memory_by_many_connections_is_found(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a handshake says of a peer, up to a megabyte, is kept as long as its connection."""
    monkeypatch.setattr(module, "MANY", 5)
    owner = f"pid:{os.getpid()}" if front.socket.endpoint.startswith("ipc") else "127.0.0.1"
    for count in range(1, 6):
        assert front.connections.flooding() == ""
        front.dealer()
        eventually(lambda count=count: front.turn() and len(front.received) == count)  # type: ignore[misc]
    assert front.connections.flooding() == owner


def test_of_many_that_prove_nothing_only_a_bounded_number_stays(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNPROVEN_OF_ADDRESS", 5)
    monkeypatch.setattr(module, "MAX_UNPROVEN", 5)
    family, address = endpoint_address(front.socket.endpoint)
    with contextlib.ExitStack() as stack:
        proven = front.dealer()
        eventually(lambda: front.turn() and front.received)
        for _ in range(40):
            raw = stack.enter_context(socket.socket(family))
            raw.connect(address)
        front.run_until(6)
        proven.send_multipart(framing.pack({"id": 2}))
        eventually(lambda: front.turn() and front.received[-1] == front.received[0])


def endpoint_address(endpoint: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    if endpoint.startswith("ipc://"):
        return socket.AF_UNIX, endpoint.removeprefix("ipc://")
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return socket.AF_INET, (host, int(port))


def test_while_messages_are_unread_connections_are_accepted_one_by_one(front: Front) -> None:
    family, address = endpoint_address(front.socket.endpoint)
    first = front.dealer()
    eventually(lambda: front.turn() and front.received)
    front.connections.accept_more(is_behind=True)
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            raw = stack.enter_context(socket.socket(family))
            raw.connect(address)
        for count in range(2, 5):
            front.run_until(count)
            first.send_multipart(framing.pack({"id": count}))
            eventually(lambda count=count: front.turn() and len(front.received) == count)  # type: ignore[misc]
            assert len(front.connections) == count, "libzmq has looked at its connections meanwhile"
            front.connections.accept_more(is_behind=True)
        front.connections.accept_more()
        front.run_until(11)


def test_who_is_shut_out_is_not_let_in_until_its_time_is_over(front: Front) -> None:
    shut_out = front.socket.access.shut_out
    owner = f"pid:{os.getpid()}" if front.socket.endpoint.startswith("ipc") else "127.0.0.1"
    shut_out.add(owner, 1000.0)
    front.dealer()
    eventually(lambda: front.turn_without_reading() and front.num_accepted and not len(front.connections))
    shut_out.add(owner, 0.0)
    front.dealer()
    eventually(lambda: front.turn() and len(front.received) == 1)


def test_the_owner_of_the_most_loses_its_silent_and_oldest_connections_first() -> None:
    def connection(fd: int, owner: str, name: bytes = b"") -> OpenConnection:
        return OpenConnection(fd, 0, owner, owner, since_s=float(fd), name=name)

    many = [connection(fd, "pid:1", b"spoke" if fd % 2 else b"") for fd in range(10)]
    few = [connection(fd, "pid:2") for fd in range(10, 13)]
    assert [each.fd for each in excess(many + few, 13)] == []
    assert [each.fd for each in excess(many + few, 6)] == [0, 2, 4, 6, 8, 1, 3]


@pytest.mark.parametrize("limit", [256, 128, 80])
def test_idle_connections_up_to_the_limit_of_files_end_nothing(model_folder: Path, limit: int) -> None:
    """At the limit libzmq (4.3.5, ipc_listener.cpp) aborts the process."""
    with GatewayProcess(model_folder, before=f"ulimit -n {limit};") as gateway, contextlib.ExitStack() as stack:
        running = RawPeer(gateway.endpoint)
        gateway.engine.going.clear()
        running.say(type="generate", id=1, prompt_ids=[5], max_tokens=5)
        assert running.hear()["type"] == "accepted"
        idle = open_idle(gateway.endpoint, 300, stack)
        gateway.engine.going.set()
        assert running.hear_all(1)[-1]["finish_reasons"] == ["length"]
        assert_serves(gateway.endpoint)
        assert gateway.process.poll() is None
        running.close()
        assert idle


def test_halves_of_handshakes_fill_no_memory(model_folder: Path) -> None:
    """Each may be as large as a message, and libzmq keeps it for seconds."""
    mib = 1 << 20
    half = GREETING + b"\x06" + mib.to_bytes(8, "big") + bytes(mib - 1)
    with GatewayProcess(model_folder, memory_bytes=512 * mib) as gateway, contextlib.ExitStack() as stack:
        for _ in range(1000):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(gateway.endpoint.removeprefix("ipc://"))
            with contextlib.suppress(OSError):  # it is ended already
                peer.sendall(half)
        assert_serves(gateway.endpoint)
        assert gateway.process.poll() is None
        eventually(lambda: gateway.resident_bytes() < 256 * mib)


def open_idle(endpoint: str, count: int, stack: contextlib.ExitStack) -> list[object]:
    """Open connections that complete their handshake and say nothing; a few at a time, as the gateway ends some."""
    found: list[object] = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            found.append(stack.enter_context(raw_connection(endpoint)))
    return found


def test_a_process_is_asked_for_by_its_number(front: Front, tmp_path: Path) -> None:
    if front.socket.endpoint.startswith("tcp"):
        pytest.skip("tcp does not tell the process")
    code = (
        "import sys, zmq; s = zmq.Context().socket(zmq.DEALER); s.connect(sys.argv[1]); "
        "s.send_multipart([b'mgpu1', b'x']); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, front.socket.endpoint], stdin=subprocess.PIPE)
    try:
        eventually(lambda: front.turn() and front.received)
        assert front.connections.owner_of(front.received[0]) == f"pid:{child.pid}"
    finally:
        child.kill()
        child.communicate()
