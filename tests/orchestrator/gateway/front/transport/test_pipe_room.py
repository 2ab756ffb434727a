"""How many bytes of answers libzmq is handed for peers that do not read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from bench.waiting import wait_until
from harness.waiting import eventually
from mgpu.orchestrator.gateway.front import socket as socket_module
from mgpu.orchestrator.gateway.front.socket import FrontSocket, Received
from mgpu.orchestrator.gateway.front.transport.io_threads import IoThreads
from mgpu.orchestrator.gateway.front.transport.open_connection import OpenConnection
from mgpu.orchestrator.gateway.front.transport.pipe_room import (
    FREE_BYTES,
    MAX_BYTES,
    MAX_TOTAL_BYTES,
    PipeRoom,
    unsent_bytes_of,
)
from mgpu.protocol.front import framing

MIB = 1 << 20


class Rooms:
    """Room in the pipes of peers that read, or do not."""

    def __init__(self) -> None:
        self.unsent = 1
        self.room = PipeRoom(lambda _: self.unsent)

    def fill(self, connection: OpenConnection, nbytes: int = 1000) -> int:
        """Return how many bytes a peer is handed, that does not read, in messages of ``nbytes``."""
        handed = 0
        while self.room.take(connection, nbytes):
            handed += nbytes
        return handed


def connection(fd: int = 1) -> OpenConnection:
    return OpenConnection(fd, 0, "pid:1", "pid:1", 0.0)


def test_who_reads_may_have_any_number() -> None:
    rooms, found = Rooms(), connection()
    rooms.unsent = 0
    assert all(rooms.room.take(found, 10_000) for _ in range(10_000))


@pytest.mark.parametrize("nbytes", [100, 5000, 100_000])
def test_who_does_not_read_may_have_a_megabyte(nbytes: int) -> None:
    rooms, found = Rooms(), connection()
    assert MAX_BYTES - nbytes <= rooms.fill(found, nbytes) <= MAX_BYTES
    rooms.unsent = 0
    assert rooms.room.take(found, nbytes), "it reads again"


class Threads(IoThreads):
    """libzmq's threads, which have worked for a while and are asleep, or wait for a core."""

    caught_up = True

    def worked_s(self) -> float:
        return 7.0

    def have_caught_up(self, worked_s: float) -> bool:
        assert worked_s in (0.0, 7.0)
        return self.caught_up


@pytest.mark.parametrize("nbytes", [100, 5000, 100_000])
def test_a_burst_that_libzmq_has_not_written_yet_counts_until_it_has(nbytes: int) -> None:
    """The kernel holds nothing of it, as if the peer had read all."""
    threads, rooms, found = Threads(), Rooms(), connection()
    rooms.unsent, rooms.room = 0, PipeRoom(lambda _: rooms.unsent, threads)
    threads.caught_up = False
    assert MAX_BYTES - nbytes <= rooms.fill(found, nbytes) <= MAX_BYTES
    threads.caught_up = True
    assert rooms.room.take(found, nbytes)
    rooms.unsent = 1
    assert rooms.fill(found, nbytes) <= MAX_BYTES


def test_one_message_of_any_size_finds_room_in_an_empty_pipe() -> None:
    rooms, found = Rooms(), connection()
    assert rooms.room.take(found, 3 * MAX_BYTES)
    assert not rooms.room.take(found, 1)


def test_many_who_do_not_read_share_a_bound_and_leave_room_to_the_next() -> None:
    rooms, peers = Rooms(), [connection(fd) for fd in range(200)]
    handed = [rooms.fill(each) for each in peers]
    assert sum(handed) <= MAX_TOTAL_BYTES + 200 * (FREE_BYTES + 1000)
    assert FREE_BYTES - 1000 <= handed[-1] <= FREE_BYTES
    for each in peers:
        rooms.room.free(each)
    assert rooms.fill(peers[0]) > FREE_BYTES, "what has ended counts no more"


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/front" if request.param == "ipc" else "tcp://127.0.0.1:0"


@pytest.fixture
def front(endpoint: str) -> Iterator[FrontSocket]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, endpoint, MIB)
    yield front
    front.close()
    context.destroy(0)


@pytest.fixture
def peer(front: FrontSocket) -> Iterator["zmq.Socket[bytes]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.RCVHWM, 1)
    peer.setsockopt(zmq.RCVBUF, 1 << 16)  # else the kernel takes tens of megabytes for it
    peer.connect(front.endpoint)
    peer.send_multipart(framing.pack({"id": 1}))
    yield peer
    context.destroy(0)


def introduced(front: FrontSocket) -> bytes:
    """Return the name of the connection whose message comes."""

    def received() -> Received | None:
        front.admit()
        front.begin_turn()
        return front.receive()

    found = eventually(received)
    assert found is not None
    return found.connection


@pytest.mark.parametrize("reads", [False, True])
def test_texts_of_a_megabyte_are_sent_to_who_reads_and_bounded_for_who_does_not(
    front: FrontSocket, peer: "zmq.Socket[bytes]", reads: bool
) -> None:
    name = introduced(front)
    found = front.connections._by_name[name]
    sent = heard = 0

    def hear() -> bool:
        front.flush()
        return bool(peer.poll(1)) and len(peer.recv_multipart()) == 2

    def waits_in_the_kernel() -> bool:
        front.flush()
        return unsent_bytes_of(found) > 0

    while sent < 40 and not front.take_lost():
        front.send(name, {"id": sent, "text": "x" * MIB})
        sent += 1
        if reads:
            eventually(hear)
            heard += 1
        elif sent >= 5:  # more than peer and kernel take; libzmq's thread may not have begun yet
            wait_until(waits_in_the_kernel, 0.2)
    assert (sent == heard == 40) if reads else sent < 40


@pytest.mark.parametrize("endpoint", ["ipc"], indirect=True)
def test_what_libzmq_does_not_accept_is_not_counted(
    front: FrontSocket, peer: "zmq.Socket[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_full(*_: object) -> None:
        raise zmq.Again

    assert peer is not None
    name = introduced(front)
    found = front.connections._by_name[name]
    with monkeypatch.context() as patched:
        patched.setattr(socket_module, "send_message_to", find_full)
        front.send(name, {"text": "x" * 1000})
        for _ in range(100):
            front.flush()
    assert (found.piped_bytes, front.connections._pipes._total) == (0, 0)
    front.flush()
    assert found.piped_bytes > 1000


def test_the_kernel_is_not_asked_for_each_of_many_short_messages() -> None:
    asked: list[OpenConnection] = []
    room, found, handed = PipeRoom(lambda each: asked.append(each) or 1), connection(), 0
    while room.take(found, 100):
        handed += 1
    assert handed > 10_000
    assert len(asked) < 100
