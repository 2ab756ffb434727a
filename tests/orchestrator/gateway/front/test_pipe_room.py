"""How many bytes of answers libzmq is handed for peers that do not read."""

import time
from pathlib import Path

import pytest
import zmq

from mgpu.orchestrator.gateway.front.open_connection import OpenConnection
from mgpu.orchestrator.gateway.front.pipe_room import FREE_BYTES, MAX_BYTES, MAX_TOTAL_BYTES, PipeRoom
from mgpu.orchestrator.gateway.front.socket import MAX_BACKLOG_BYTES, FrontSocket
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


@pytest.mark.parametrize("reads", [False, True])
def test_texts_of_a_megabyte_are_sent_to_who_reads_and_bounded_for_who_does_not(endpoint: str, reads: bool) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, endpoint, MIB)
    peers: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peer = peers.socket(zmq.DEALER)
    peer.setsockopt(zmq.RCVHWM, 1)
    peer.setsockopt(zmq.RCVBUF, 1 << 16)  # else the kernel takes tens of megabytes for it
    peer.connect(front.endpoint)
    peer.send_multipart(framing.pack({"id": 1}))
    deadline_s = time.monotonic() + 60
    while (received := front.receive()) is None and time.monotonic() < deadline_s:
        front.admit()
        front.begin_turn()
    assert received is not None
    sent = heard = 0
    while sent < 40 and not front.take_lost() and time.monotonic() < deadline_s:
        front.send(received.connection, {"id": sent, "text": "x" * MIB})
        sent += 1
        while reads and heard < sent and time.monotonic() < deadline_s:
            front.flush()
            heard += bool(peer.poll(1)) and len(peer.recv_multipart()) == 2
    assert (sent == heard == 40) if reads else sent <= MAX_BACKLOG_BYTES // MIB + 4
    peers.destroy(0)
    front.close()
    context.destroy(0)
