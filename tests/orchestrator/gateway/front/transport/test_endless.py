"""A message without an end is cut off while it is sent, and a large one, or one that has to wait, is not."""

import contextlib
import socket
import threading
from collections.abc import Collection
from pathlib import Path

import pytest
import zmq

from harness.servers.zmtp_flood import raw_connection
from harness.waiting import eventually
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.gateway.front.transport.endless import ENDLESS_S, LOOK_S, EndlessMessages
from mgpu.orchestrator.gateway.front.transport.open_connection import OpenConnection
from mgpu.protocol.front import framing


class Kernel:
    """What the kernel says of each descriptor."""

    def __init__(self) -> None:
        self.unread: dict[int, int] = {}
        self.polled: set[int] = set()
        self.num_looks = 0

    def unread_bytes(self, fd: int) -> int:
        self.num_looks += 1
        if fd not in self.unread:
            raise OSError
        return self.unread[fd]

    def polled_for_input(self, fds: Collection[int]) -> set[int]:
        return self.polled.intersection(fds)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def looks(kernel: Kernel) -> EndlessMessages:
    return EndlessMessages(kernel.unread_bytes, kernel.polled_for_input)


def connection(fd: int) -> OpenConnection:
    return OpenConnection(fd, 0, "pid:1", "pid:1", 0.0)


def ended(looks: EndlessMessages, connections: list[OpenConnection], num_looks: int) -> list[int]:
    found = []
    for _ in range(num_looks):
        found += [each.fd for each in looks.look(looks._worked_s + 1.01 * looks._next_s, connections)]
    return found


NUM_LOOKS = round(ENDLESS_S / LOOK_S)


def test_who_keeps_libzmq_busy_and_finishes_no_message_is_ended(looks: EndlessMessages, kernel: Kernel) -> None:
    flood, idle, gone = (connection(fd) for fd in (1, 2, 3))
    kernel.unread, kernel.polled = {1: 200_000, 2: 0}, {1, 2}
    assert ended(looks, [flood, idle, gone], NUM_LOOKS - 2) == []
    assert ended(looks, [flood, idle, gone], 2) == [1]


def test_a_message_now_and_then_is_enough(looks: EndlessMessages, kernel: Kernel) -> None:
    busy = connection(1)
    kernel.unread, kernel.polled = {1: 200_000}, {1}
    for _ in range(10):
        assert ended(looks, [busy], NUM_LOOKS - 2) == []
        busy.is_heard = True


def test_whose_messages_wait_for_the_gateway_is_not_ended(looks: EndlessMessages, kernel: Kernel) -> None:
    """libzmq does not read of a connection that has as many unread messages as it may."""
    waiting = connection(1)
    kernel.unread = {1: 200_000}
    assert ended(looks, [waiting], 5 * NUM_LOOKS) == []
    kernel.polled = {1}
    assert ended(looks, [waiting], NUM_LOOKS - 2) == [], "it begins anew"


def test_nothing_is_looked_at_while_libzmq_is_idle(looks: EndlessMessages, kernel: Kernel) -> None:
    for _ in range(100):
        assert looks.look(0.9 * LOOK_S, [connection(1)]) == []
    assert kernel.num_looks == 0


def test_a_real_message_without_an_end_never_arrives(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20)
    received = []
    cut_off = threading.Event()

    def send_empty_frames(peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.sendall(b"\x01\x00" * 10_000)
        cut_off.set()

    def turn() -> bool:
        front.admit()
        front.begin_turn()
        if (message := front.receive()) is not None:
            received.append(message)
        return cut_off.is_set()

    def flood() -> None:
        with raw_connection(front.endpoint) as peer:
            send_empty_frames(peer)

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    eventually(turn)
    thread.join()
    assert not received
    honest = context.socket(zmq.DEALER)
    honest.connect(front.endpoint)
    honest.send_multipart([framing.VERSION, bytes(1 << 20)])
    eventually(lambda: turn() and received)
    assert len(received[0].frames) == 2
    front.close()
    context.destroy(0)
