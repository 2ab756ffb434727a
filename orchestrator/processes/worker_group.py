"""The worker group of one epoch: start its processes, exchange messages, find the first failure, stop them all.

Three words for its end: `stop` asks all ranks to leave, waits, and kills the rest; `kill_with_stacks` has each rank
write its stacks first; `kill` sends SIGKILL and collects the exit statuses. `ChildProcess.kill` does that for one.

The group lives and dies as one. When several ranks fail, the earliest failure is the cause: the others mostly report
that a peer is gone. Example: rank 2 is killed; rank 0 notices a broken connection and reports a failure at 10.05 s;
this process sees the death at 10.06 s. Deaths count as half a second earlier (9.56 s), so rank 2 is named. A report
that the model's files are at fault goes before everything else: no lost peer provokes it.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Container
from dataclasses import replace
from typing import cast

import zmq

from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.processes.child_process import ChildProcess, describe_exit
from mgpu.orchestrator.processes.failures import WorkerLost
from mgpu.orchestrator.processes.rank_reports import RankReports
from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.internal.worker_messages import (
    CONTROL,
    AllocateCache,
    Shutdown,
    StepResult,
    WorkerFailure,
    WorkerSpec,
)
from mgpu.protocol.model.kv_pools import PoolSize

log = logging.getLogger(__name__)

ZmqContext = zmq.Context[zmq.Socket[bytes]]
ZmqSocket = zmq.Socket[bytes]

SILENT_DEATH_HEAD_START_S = 0.5
"""Deaths count as this much earlier: a peer may notice the broken connection before this process sees the death.

Not deaths by a signal other than SIGKILL: such as SIGABRT may be provoked by a lost peer.
"""
GRACE_S = 1.0
"""How long to wait for other ranks' reports after the first sign of failure."""
RECEIVE_LIMIT = 64
"""Messages to drop before others get their turn."""
DUMP_S = 0.2
"""Time for the ranks to write their stacks. A signal handler in C does it at once, unless the process is stopped."""


class WorkerGroup(RankReports):
    """All workers of one epoch, from `start` to `stop`. Use from the main thread only."""

    def __init__(self, context: ZmqContext, runtime: RuntimeDir, config: ServerConfig, epoch: int = 0) -> None:
        super().__init__()
        self.sockets: list[ZmqSocket] = []
        self.processes: list[ChildProcess] = []
        self._context = context
        self._runtime = runtime
        self._config = config
        self.epoch = epoch
        self.world_size = config.layout.placement.world_size
        self.is_waiting = False
        self._rendezvous = runtime.path / f"rendezvous-{epoch}"
        self._shared_fd = -1
        """Number of the shared memory's descriptor in the workers."""
        self._has_logged_garbage = False
        self._failures: dict[int, WorkerLost] = {}
        self._output_rank = config.layout.placement.output_rank

    # -- start ---------------------------------------------------------------------------------------------------------

    def park(self) -> None:
        """Spawn every rank; each imports its modules and waits for `start`.

        OSError when one cannot be spawned; `kill` the group then.
        """
        self._spawn(is_parked=True)

    def wake_up(self) -> None:
        """Have parked processes open their GPUs: `start` comes soon."""
        for process in self.processes:
            process.wake_up()

    def start(self, captures_library: bool = True) -> None:
        """Spawn the ranks unless `park` has, and send every rank its spec."""
        if not self.processes:
            self._spawn()
        for rank, process in enumerate(self.processes):
            process.tell(CONTROL.encode(replace(self._spec(self._bind(rank), rank), captures_library=captures_library)))

    @property
    def is_whole(self) -> bool:
        """Whether every process lives."""
        return all(status is None for status in self._exit_statuses())

    def _spawn(self, is_parked: bool = False) -> None:
        """Start the processes. The shared memory has no name: it vanishes with the last of them."""
        shared_bytes = self._config.shared_bytes
        shared_fd = os.memfd_create(f"mgpu-{self.epoch}") if shared_bytes else -1
        try:
            if shared_fd >= 0:
                os.ftruncate(shared_fd, shared_bytes)
            for rank in range(self._config.layout.placement.world_size):
                pass_fds = (shared_fd,) if shared_fd >= 0 else ()
                waiting = ("--standby", self._config.device_of(rank)) if is_parked else ()
                command = (*self._config.worker_command, *waiting)
                self.processes.append(ChildProcess(f"worker {rank}", command, None, self._environment(rank), pass_fds))
                self._runtime.add_worker(self.processes[-1].pid)
                self._bind_to_processors(rank)
        finally:
            if shared_fd >= 0:
                os.close(shared_fd)
        self._shared_fd = shared_fd

    def _bind_to_processors(self, rank: int) -> None:
        """Let a worker run only on the processors next to its GPU, of those that this process may use.

        It has just begun, so the threads that it will make inherit that, and its memory is allocated there.
        """
        near = self._config.worker_cpus[rank] if self._config.worker_cpus else frozenset()
        if allowed := near & os.sched_getaffinity(0):
            with contextlib.suppress(OSError):  # a process that has ended is noticed elsewhere
                os.sched_setaffinity(self.processes[rank].pid, allowed)

    def _bind(self, rank: int) -> str:
        socket = self._context.socket(zmq.DEALER)
        self.sockets.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)  # at most a few steps are in flight; the pipeline's depth is the bound
        socket.setsockopt(zmq.IPC_FILTER_PID, self.processes[rank].pid)  # nobody else can connect
        return self._runtime.bind(socket, f"worker-{self.epoch}-{rank}")

    def _spec(self, endpoint: str, rank: int) -> WorkerSpec:
        config = self._config
        return replace(
            config.worker_spec(self.epoch, rank),
            device=config.device_of(rank),
            endpoint=endpoint,
            rendezvous=f"file://{self._rendezvous}",
            shared_fd=self._shared_fd,
            shared_bytes=config.shared_bytes if self._shared_fd >= 0 else 0,
            num_threads=config.threads_of(rank),
        )

    def _environment(self, rank: int) -> dict[str, str]:
        """Return torchrun's variables for a worker, without an address: the group meets in a file."""
        env = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
        world = str(self._config.layout.placement.world_size)
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        if self._config.device_kind == "cuda":
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # ordinals as the planner and nvidia-smi count them
        if threads := self._config.threads_of(rank):
            env["OMP_NUM_THREADS"] = str(threads)
            # Threads that wait for a peer sleep almost at once. On busy cores a spinning thread takes the time that the
            # peer needs: beside two busy processes a decode step took 60 ms instead of 780; alone it takes 5 % longer.
            env.setdefault("GOMP_SPINCOUNT", "5000")
            # glibc asks for huge pages where the system grants them on request, which saves page walks while weights
            # stream: one decode stream is 15 % faster, eight are 5 to 9 %.
            env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        return env | (self._config.worker_envs[rank] if self._config.worker_envs else {})

    # -- messages ------------------------------------------------------------------------------------------------------

    def publish(self, data: bytes) -> None:
        """Send the same bytes to every rank. WorkerLost when a rank's connection is gone."""
        for rank, socket in enumerate(self.sockets):
            try:
                socket.send(data, zmq.NOBLOCK)
            except zmq.Again:
                raise self._unreachable(rank) from None

    def allocate_cache(self, at_most: PoolSize | None = None) -> PoolSize:
        """Have all ranks allocate the smallest pools that any of them reported; return their size."""
        size = self.smallest_pools(at_most)
        self.publish(CONTROL.encode(AllocateCache(self.epoch, *size)))
        return size

    def try_result(self) -> StepResult | None:
        """Return the next step's result if it has come. WorkerLost if the output rank reports a failure instead."""
        message = self._receive(self._output_rank)
        if message is None or isinstance(message, StepResult):
            return message
        self._take(self._output_rank, message)
        return None

    def take_in(self, events: Container[object]) -> None:
        """Notice deaths and read messages, as far as the ``events`` of a poll announce any.

        WorkerLost with the earliest failure. A worker that ends has failed, whatever its status: none ends unasked. The
        output rank, once it is ready, sends only results, which are left for `try_result`.
        """
        if any(process.pidfd in events for process in self.processes) and self._note_deaths():
            raise self._earliest_failure()
        for rank, socket in enumerate(self.sockets):
            if socket in events and not (rank == self._output_rank and rank in self.ready):
                while (message := self._receive(rank)) is not None:
                    self._take(rank, message)

    def _receive(self, rank: int) -> object | None:
        """Return the next message of this epoch. What is no message, or of another epoch, is dropped.

        It need not come from the worker: the socket's folder may have been opened to others.
        """
        for _ in range(RECEIVE_LIMIT):
            try:
                message = CONTROL.decode(self.sockets[rank].recv(zmq.NOBLOCK))
            except zmq.Again:
                return None
            except CodecError as error:
                if not self._has_logged_garbage:
                    self._has_logged_garbage = True
                    log.warning("ignored what is no message at the socket of worker %d: %s", rank, error)
                continue
            if message.epoch == self.epoch:
                return cast("object", message)
        return None

    def _take(self, rank: int, message: object) -> None:
        if isinstance(message, WorkerFailure):
            self._note_failure(message)
            raise self._earliest_failure()
        self.keep(rank, message)

    # -- failure -------------------------------------------------------------------------------------------------------

    def broken(self, message: str) -> WorkerLost:
        """Return the failure of the output rank that sent an impossible result."""
        return self._lost(self._output_rank, message)

    def _lost(self, rank: int, message: str, earlier_s: float = 0.0) -> WorkerLost:
        return WorkerLost(rank, self.phase_of(rank), message, time.monotonic() - earlier_s)

    def _note_failure(self, failure: WorkerFailure) -> None:
        self._failures[failure.rank] = WorkerLost(
            failure.rank,
            failure.phase,
            failure.message,
            failure.at_s,
            failure.traceback,
            failure.is_mistake,
            failure.in_capture,
        )

    def _unreachable(self, rank: int) -> WorkerLost:
        """Return why a rank's connection is gone: its process has ended, or has closed it."""
        if self.processes[rank].wait(time.monotonic() + GRACE_S):
            self._note_deaths()
        else:
            self._failures[rank] = self._lost(rank, "it closed its connection")
        return self._earliest_failure()

    def _note_deaths(self) -> bool:
        """Note failures of the workers that have ended; return whether there are any."""
        statuses = self._exit_statuses()
        for rank, status in enumerate(statuses):
            if status is not None and rank not in self._failures and not self._read_failure(rank):
                message = f"the process {describe_exit(status)}"
                head_start_s = SILENT_DEATH_HEAD_START_S if status >= 0 or status == -signal.SIGKILL else 0.0
                self._failures[rank] = self._lost(rank, message, head_start_s)
        return any(status is not None for status in statuses)

    def _read_failure(self, rank: int) -> bool:
        """Note the failure that a worker has reported, if any; drop its other messages."""
        while self.sockets[rank].poll(20):
            message = self._receive(rank)
            if isinstance(message, WorkerFailure):
                self._note_failure(message)
                return True
        return False

    def _earliest_failure(self) -> WorkerLost:
        """Wait shortly for the other ranks' reports, then return the earliest."""
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            self._note_deaths()
            if -signal.SIGKILL in self._exit_statuses():
                break  # killed from outside, so no other rank's failure is the cause
            silent = [rank for rank in range(len(self.sockets)) if rank not in self._failures]
            if not silent:
                break
            for rank in silent:
                self._read_failure(rank)
        return min(self._failures.values(), key=lambda failure: (not failure.is_mistake, failure.at_s))

    def _exit_statuses(self) -> list[int | None]:
        return [process.exit_status() for process in self.processes]

    # -- stop ----------------------------------------------------------------------------------------------------------

    def stop(self, deadline_s: float, hurry_fd: int = -1) -> None:
        """Ask every worker to leave, wait for all of them, kill the rest.

        The wait ends at CLOCK_MONOTONIC ``deadline_s`` or when ``hurry_fd`` is readable.
        A worker that loads reads no messages, so one that has not become ready is not waited for.
        """
        if len(self.ready) == len(self.processes) and not self._failures:
            with contextlib.suppress(WorkerLost):  # a rank that is gone needs no message
                self.publish(CONTROL.encode(Shutdown(self.epoch)))
            for process in self.processes:
                process.wait(deadline_s, hurry_fd)
        self.kill()

    def kill_with_stacks(self) -> None:
        """Have each rank write its stacks to standard error, then kill all of them."""
        for process in self.processes:
            process.send_signal(signal.SIGUSR1)
        deadline_s = time.monotonic() + DUMP_S
        for process in self.processes:
            process.wait(deadline_s)
        self.kill_at_once()

    def kill_at_once(self) -> None:
        """Kill all ranks at the same time, and collect them."""
        for process in self.processes:  # `kill` collects them one after another
            process.send_signal(signal.SIGKILL)
        self.kill()
        with contextlib.suppress(OSError):  # the next epoch has another one
            self._rendezvous.unlink()

    def kill(self) -> None:
        """Kill the processes that are left, and close the sockets. A second call does nothing."""
        for process in self.processes:
            process.kill()
        self._runtime.remove_workers([process.pid for process in self.processes])
        for socket in self.sockets:
            self._runtime.close_socket(socket)
        self.processes, self.sockets = [], []
