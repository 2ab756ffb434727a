"""Strangers, and bytes that are no message, at the sockets between processes: nothing is restarted."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from harness.servers.server_process import config, ready_server
from harness.waiting import eventually
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.processes.gateway_process import GatewayProcess, Watchdog
from mgpu.orchestrator.processes.worker_group import WorkerGroup
from mgpu.protocol.internal.gateway_messages import LINK, WakeUp
from mgpu.protocol.internal.worker_messages import CONTROL, LoadProgress

Pair = tuple[zmq.Socket[bytes], zmq.Socket[bytes]]
GARBAGE = [b"", b"\x00", b"\xff\x00 hi", b"hello", b"\x93\x01\x02\x03", bytes(1000)] * 5


@pytest.fixture
def pair() -> Iterator[Pair]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as own, context.socket(zmq.DEALER) as other:
        own.bind("inproc://garbage")
        other.connect("inproc://garbage")
        yield own, other


def one_warning(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return [words in record.getMessage() for record in caplog.records] == [True]


def test_a_worker_group_drops_what_is_no_message_or_of_another_epoch(
    pair: Pair, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = pair
    with RuntimeDir({"MGPU_RUNTIME_DIR": str(folder)}) as runtime:
        group = WorkerGroup(zmq.Context.instance(), runtime, config(), epoch=3)
    group.sockets = [own]
    good = LoadProgress(3, 0, "weights", 1, 2, 0.5)
    for data in (*GARBAGE, CONTROL.encode(LoadProgress(2, 0, "cache", 1, 2, 0.5)), CONTROL.encode(good)):
        other.send(data)
    with caplog.at_level(logging.WARNING):
        eventually(lambda: group.take_in({own: zmq.POLLIN}) or group.progress)
    assert group.progress == {0: good}
    assert one_warning(caplog, "ignored what is no message at the socket of worker 0")


def test_what_is_no_message_does_not_replace_the_gateway(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    own, other = pair
    gateway = GatewayProcess.__new__(GatewayProcess)  # its own start would need a whole server
    gateway.socket, gateway._watchdog, gateway._unread, gateway._has_logged_garbage = own, Watchdog(), [], False
    for data in (*GARBAGE, LINK.encode(WakeUp())):
        other.send(data)
    with caplog.at_level(logging.WARNING):
        assert eventually(lambda: list(gateway.receive(100))) == [WakeUp()]
    assert one_warning(caplog, "ignored what is no message at the gateway's socket")


STRANGER = """
import os, socket, sys
uid, path = int(sys.argv[1]), sys.argv[2]
if uid:
    os.setgroups([])
    os.setuid(uid)
ready = b"\\x05READY\\x0bSocket-Type\\0\\0\\0\\x06DEALER"
greeting = b"\\xff" + bytes(8) + b"\\x7f\\x03\\0NULL" + bytes(48)
with socket.socket(socket.AF_UNIX) as peer:
    peer.settimeout(20)
    peer.connect(path)
    heard = 0
    try:
        peer.sendall(greeting + b"\\x04" + bytes([len(ready)]) + ready + b"\\0\\5\\xff\\0 hi")
        while data := peer.recv(100):
            heard += len(data)
    except ConnectionError:
        pass
print(heard)
"""


@pytest.mark.parametrize("uid", [0, 65534], ids=["same user", "another user"])
def test_only_the_process_that_was_started_can_use_its_socket(folder: Path, uid: int) -> None:
    """Even if somebody has opened the folder on purpose."""
    if uid and os.getuid():
        pytest.skip("only root can become another user")
    with ready_server(folder, max_restarts=0) as server:
        names = [*folder.rglob("link-*"), *folder.rglob("worker-*")]
        assert len(names) == 2
        for name in names:
            name.chmod(0o777)
            for parent in name.parents[: len(name.parts) - len(folder.parts)]:
                parent.chmod(0o755)
            told = subprocess.run(
                [sys.executable, "-c", STRANGER, str(uid), str(name)], capture_output=True, timeout=60, check=True
            )
            assert told.stdout.strip() == b"0", "the connection was ended before a byte was sent"
        server.serve(1, [1, 2, 3], 5)
        assert "ignored" not in server.log
        assert server.counters()["gateway_restarts"] == server.counters()["restarts"] == 0
