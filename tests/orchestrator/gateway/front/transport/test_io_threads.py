"""libzmq's threads of the front channel come after the streams, and those of the engine's link do not."""

import os
import time
from pathlib import Path

import pytest
import zmq

from harness.servers.gateway_process import GatewayProcess
from harness.waiting import eventually
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.gateway.front.transport import io_threads
from mgpu.orchestrator.gateway.front.transport.io_threads import LOOP_S, NICENESS, IoThreads, threads_of_process


def test_a_flood_meets_a_thread_of_low_priority_and_the_engine_another(gateway: GatewayProcess) -> None:
    def niceness_of_io_threads() -> list[int]:
        tasks = Path(f"/proc/{gateway.process.pid}/task").iterdir()
        found = [task.name for task in tasks if (task / "comm").read_text().startswith("ZMQbg/IO")]
        return sorted(os.getpriority(os.PRIO_PROCESS, int(name)) for name in found)

    ours = os.getpriority(os.PRIO_PROCESS, gateway.process.pid)
    eventually(lambda: niceness_of_io_threads() == [ours, min(ours + NICENESS, 19)], niceness_of_io_threads)


def test_only_what_the_threads_themselves_work_is_counted(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20)
    peer = context.socket(zmq.DEALER)
    peer.connect(front.endpoint)
    began_s = time.thread_time()
    while time.thread_time() - began_s < 0.1:
        pass
    idle_s = front.io_threads.worked_s()
    for _ in range(500):
        peer.send(b"")
    eventually(lambda: front.admit() or front.io_threads.worked_s() > idle_s)
    assert idle_s < 0.1
    front.close()
    context.destroy(0)


def test_threads_have_caught_up_once_they_sleep_or_have_worked_long_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front = FrontSocket(context, f"ipc://{tmp_path}/front", 1 << 20)
    threads = front.io_threads
    eventually(lambda: threads.have_caught_up(threads.worked_s()))
    monkeypatch.setattr(io_threads, "_is_asleep", lambda _number: False)
    now_s = threads.worked_s()
    assert not threads.have_caught_up(now_s)
    assert threads.have_caught_up(now_s - LOOP_S)
    front.close()
    context.destroy(0)


def test_a_context_that_had_its_threads_before_is_left_alone() -> None:
    threads = IoThreads(threads_of_process() - threads_of_process())
    assert threads.worked_s() == 0
