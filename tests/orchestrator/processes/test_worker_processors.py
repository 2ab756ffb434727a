"""Workers run on the processors next to their GPUs, of those that the server may use."""

import os
import sys
from pathlib import Path

import zmq

from harness.servers.server_process import config
from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.processes.worker_group import WorkerGroup

IDLE = (sys.executable, "-c", "input()")


def processors_of(settings: ServerConfig, folder: Path) -> list[set[int]]:
    """Start workers that do nothing, and return where each may run."""
    with zmq.Context[zmq.Socket[bytes]]() as context, RuntimeDir({"MGPU_RUNTIME_DIR": str(folder)}) as runtime:
        group = WorkerGroup(context, runtime, settings)
        try:
            group.park()
            return [os.sched_getaffinity(process.pid) for process in group.processes]
        finally:
            group.kill()


def test_each_worker_has_the_processors_of_its_gpu_that_are_allowed(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    one, elsewhere = min(allowed), max(allowed) + 1000
    near = (frozenset({one, elsewhere}), frozenset({elsewhere}), frozenset[int]())
    settings = config(num_stages=1, ranks_per_stage=3, worker_command=IDLE, worker_cpus=near)
    assert processors_of(settings, tmp_path) == [{one}, allowed, allowed]


def test_workers_run_anywhere_where_nothing_is_known(tmp_path: Path) -> None:
    assert processors_of(config(worker_command=IDLE), tmp_path) == [os.sched_getaffinity(0)]
