"""The front channel: one slow reader, and the numbers of connections."""

import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from mgpu.orchestrator.gateway.front import socket as module
from mgpu.orchestrator.gateway.front.socket import FrontSocket

CLIENT = b"slow"


def test_nothing_follows_what_was_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BACKLOG_BYTES", 5000)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20, None)
    taken: list[list[bytes]] = []
    reads = False

    def try_send(message: list[bytes]) -> bool:
        if reads:
            taken.append(message)
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
