"""The front channel: one slow reader, too many frames, and the numbers of connections."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from harness.waiting import eventually
from mgpu.orchestrator.gateway.front import socket as module
from mgpu.orchestrator.gateway.front import strikes
from mgpu.orchestrator.gateway.front.socket import FRAMES_PER_TURN, FrontSocket, Received
from mgpu.protocol.front import framing

CLIENT = b"slow"


def test_nothing_follows_what_was_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BACKLOG_BYTES", 5000)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20, None)
    taken: list[bytes] = []
    reads = False

    def try_send(_connection: bytes, body: bytes) -> bool:
        if reads:
            taken.append(body)
        return reads

    monkeypatch.setattr(front, "_try_send", try_send)
    for _ in range(10):
        front.send(CLIENT, {"text": "x" * 1000})
    reads = True
    front.send(CLIENT, {"text": "the end"})
    front.flush()
    assert taken == []
    assert front.take_lost() == {CLIENT: "slow"}
    front.send(CLIENT, {"type": "failed"})
    assert len(taken) == 1, "once its requests are ended it is told why"
    front.close()
    context.destroy(0)


PRINT_FIRST_ID = """
import sys, zmq
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.protocol.front import framing
context = zmq.Context()
front = FrontSocket(context, sys.argv[1], 1 << 20)
peer = context.socket(zmq.DEALER)
peer.connect(sys.argv[1])
peer.send_multipart(framing.pack({"id": 1}))
while (received := front.receive()) is None:
    front.access.answer_requests()
print(received.connection.hex())
context.destroy(0)
"""


def test_the_first_routing_id_of_a_gateway_cannot_be_foretold(tmp_path: Path) -> None:
    """libzmq aborts the process when a peer has chosen the automatic id that is next."""
    command = [sys.executable, "-c", PRINT_FIRST_ID]
    outputs = [subprocess.check_output([*command, f"ipc://{tmp_path}/front{at}"], timeout=60) for at in range(3)]
    assert len(set(outputs)) == 3, outputs
    assert all(len(output.strip()) == 10 and output.startswith(b"00") for output in outputs), outputs


def test_a_message_of_many_frames_is_read_in_bounded_turns(tmp_path: Path) -> None:
    num_turns, deadline_s = 0, time.monotonic() + 20
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20)

    def next_message() -> Received:
        """Take turns until a message comes."""
        nonlocal num_turns
        while time.monotonic() < deadline_s:
            front.access.answer_requests()
            front.begin_turn()
            num_turns += 1
            if (received := front.receive()) is not None:
                return received
        raise AssertionError("no message")

    peer = context.socket(zmq.DEALER)
    peer.connect(front.endpoint)
    for _ in range(2):
        peer.send_multipart([framing.VERSION, *[b""] * (10 * FRAMES_PER_TURN)])
    peer.send_multipart(framing.pack({"id": 1}))
    assert len(next_message().frames) == framing.MAX_FRAMES + 1
    assert front.receive() is None, "the rest does not fit into this turn"
    for expected in (framing.MAX_FRAMES + 1, 2):
        num_turns = 0
        assert len(next_message().frames) == expected
        assert num_turns >= 10
    front.close()
    context.destroy(0)


def test_who_sends_too_many_frames_again_and_again_is_cut_off_and_shut_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strikes, "TOLERATED_FRAMES", 1000)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20)
    peers: list[zmq.Socket[bytes]] = []

    def send(num_frames: int) -> int:
        """Send a message; return how many connections are left when it has been read and skipped."""
        peer = context.socket(zmq.DEALER)
        peer.setsockopt(zmq.RECONNECT_IVL, -1)
        peer.connect(front.endpoint)
        peer.send_multipart([framing.VERSION, *[b""] * num_frames])
        received: list[Received] = []

        def turn() -> bool:
            front.admit()
            front.begin_turn()
            received.extend(each for each in [front.receive()] if each is not None)
            return bool(received) and not front.is_skipping

        eventually(turn)
        peers.append(peer)
        return len(front.connections)

    assert [send(900) for _ in range(3)] == [1, 1, 1], "the second and the third connection are ended"
    assert front.access.shut_out.has(f"pid:{os.getpid()}")
    front.close()
    context.destroy(0)


def test_what_libzmq_does_for_frames_and_bytes_is_estimated(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20)
    peer = context.socket(zmq.DEALER)
    peer.connect(front.endpoint)
    costs = []
    for frames in ([b"x"], [b"x" * 10**6], [b""] * 1500):
        peer.send_multipart(frames)
        deadline_s, received = time.monotonic() + 20, None
        while (received is None or front.is_skipping) and time.monotonic() < deadline_s:
            front.access.answer_requests()
            front.begin_turn()
            received = front.receive() or received
        costs.append(front.take_receiving_s())
    most = framing.MAX_FRAMES + 2
    assert costs == pytest.approx([2e-6, 2e-6 + 0.7e-3, most * 1e-6], rel=0.01), "others wait until frames are skipped"
    assert front.take_receiving_s() == 0
    front.close()
    context.destroy(0)


def test_messages_of_several_frames_share_the_frames_of_a_turn(tmp_path: Path) -> None:
    deadline_s, num_read = time.monotonic() + 20, 0
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20)
    peer = context.socket(zmq.DEALER)
    peer.connect(front.endpoint)
    for _ in range(4):
        peer.send_multipart([framing.VERSION, *[b""] * (FRAMES_PER_TURN - 50)])
    while num_read < 4 and time.monotonic() < deadline_s:
        front.access.answer_requests()
        front.begin_turn()
        in_turn = 0
        while front.receive() is not None:
            in_turn += 1
        num_read += in_turn
        assert in_turn <= 2
    assert num_read == 4
    front.close()
    context.destroy(0)


LEAVE_UNREAD = """
import sys, time, zmq
from mgpu.protocol.front import framing
framing.HEARTBEAT_INTERVAL_MS = 1000
context = zmq.Context()
router = context.socket(zmq.ROUTER)
framing.set_server_options(router, 1 << 20)
if router.getsockopt(zmq.HEARTBEAT_IVL):
    router.setsockopt(zmq.HEARTBEAT_IVL, 50)
router.bind(sys.argv[1])
peers = zmq.Context()
peer = peers.socket(zmq.DEALER)
peer.setsockopt(zmq.SNDHWM, 0)
peer.connect(sys.argv[1])
for _ in range(5000):
    peer.send(bytes(1000))
assert router.poll(20000)
peers.destroy(0)  # most of it is unread, and stays so
time.sleep(0.5)
print("alive")
"""


def test_a_client_that_sends_much_and_leaves_does_not_abort_the_gateway(tmp_path: Path) -> None:
    """A heartbeat that is due on such a connection is an assertion in libzmq."""
    command = [sys.executable, "-c", LEAVE_UNREAD, f"ipc://{tmp_path}/front"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "alive\n", done.stderr
