"""Which losses count to the limit of restarts: those of epochs that were ready."""

import time

import pytest
import zmq

from harness.servers.server_process import config
from mgpu.orchestrator.config import Restarts
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.processes.failures import HostLost, TooManyRestarts, WorkerLost
from mgpu.orchestrator.processes.worker_group import WorkerGroup
from mgpu.orchestrator.processes.worker_processes import WorkerProcesses


class Quiet(WorkerGroup):
    """A group without processes."""

    def start(self, captures_library: bool = True) -> None:
        pass


def workers(monkeypatch: pytest.MonkeyPatch, folder: str) -> WorkerProcesses:
    monkeypatch.setenv("MGPU_RUNTIME_DIR", folder)
    described = config(restarts=Restarts(max_restarts=1))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    runtime = RuntimeDir()
    found = WorkerProcesses(context, runtime, described, lambda epoch: Quiet(context, runtime, described, epoch))
    found.start()
    return found


def lost(kind: type[WorkerLost]) -> WorkerLost:
    return kind(1, "spawn", "host b is lost", time.monotonic())


def test_a_host_that_is_lost_before_its_epoch_is_ready_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: str
) -> None:
    group = workers(monkeypatch, str(tmp_path))
    for _ in range(3):
        group.replace(lost(HostLost))
    assert (group.restarts.count, group.restarts.counted) == (3, 0)
    group.is_ready = True
    group.replace(lost(HostLost))
    assert group.restarts.counted == 1
    with pytest.raises(TooManyRestarts):
        group.replace(lost(WorkerLost))
