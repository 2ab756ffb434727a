"""The front channel towards one slow reader."""

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
