"""The worker that an agent runs: one process an epoch. It ends with the agent, as any worker with its parent."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

from mgpu.protocol.internal.host_messages import StartWorker, worker_identity
from mgpu.protocol.internal.process.child import frame_spec
from mgpu.protocol.internal.worker_messages import CONTROL, WorkerSpec
from mgpu.protocol.keys import ClientKeys
from mgpu.worker.start.join.launcher import Launched

WORKER_COMMAND = (sys.executable, "-m", "mgpu.worker")
_PIPE_BYTES = 1 << 20
_STACKS_S = 0.2
"""Time for a worker to write its stacks before it is killed."""


class Worker:
    """A worker process of one epoch. Making it starts it. OSError if that cannot be."""

    def __init__(self, spec: WorkerSpec, environ: dict[str, str], command: tuple[str, ...]) -> None:
        self.epoch = spec.epoch
        self._process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        self.pidfd = os.pidfd_open(self._process.pid)
        with contextlib.suppress(
            OSError
        ):  # writing must not wait until the worker reads: the agent says hello meanwhile
            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._process.stdin.write(frame_spec(CONTROL.encode(spec)))
        self._process.stdin.flush()

    def status(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def end(self, wants_stacks: bool = False) -> int:
        """Kill it if it still runs, and return its exit status."""
        if wants_stacks and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            deadline_s = time.monotonic() + _STACKS_S
            while self._process.poll() is None and time.monotonic() < deadline_s:
                time.sleep(0.01)
        self._process.kill()
        status = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        os.close(self.pidfd)
        return status


def completed(order: StartWorker, incarnation: bytes, keys: ClientKeys, endpoint: str, here: "Here") -> WorkerSpec:
    """Return the spec of an order with what only this host knows."""
    spec = order.spec
    assert spec.joined is not None
    identity = worker_identity(incarnation, spec.epoch)
    return replace(
        spec,
        endpoint=endpoint,
        model=replace(spec.model, path=here.model_path),
        device=here.device,
        num_threads=spec.num_threads or here.num_threads,
        joined=replace(spec.joined, identity=identity, secret=keys.secret, server_key=keys.server),
    )


class Here:
    """What only this host knows of its worker."""

    def __init__(self, launched: Launched, model_path: str, device: str) -> None:
        self.model_path = model_path
        self.device = device
        cores = len(os.sched_getaffinity(0))
        self.num_threads = max(1, cores // launched.local_world_size) if device == "cpu" else 0
        """CPU threads of a worker; 0: torch's default."""

    def environment(self, order: StartWorker, interface: str) -> dict[str, str]:
        """Return the environment of a worker: torchrun's names, with the rank of the plan."""
        env = dict(os.environ)
        address, _, port = order.master.rpartition(":")
        world = str(order.spec.layout.placement.world_size)
        env |= {"RANK": str(order.rank), "WORLD_SIZE": world, "MASTER_ADDR": address, "MASTER_PORT": port}
        if interface:
            env.setdefault("GLOO_SOCKET_IFNAME", interface)
            env.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        if self.num_threads:
            env["OMP_NUM_THREADS"] = str(self.num_threads)
            env.setdefault("GOMP_SPINCOUNT", "5000")  # as of a worker that the orchestrator starts
            env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        return env
