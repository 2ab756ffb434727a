"""The worker group of one epoch on hosts that have joined: what `WorkerGroup` is for the processes of one machine.

It has no process ids: deaths are told by the agents, or noticed by their silence. Times of failures are not compared
either, since each host has a clock of its own. What counts is what a failure says: files at fault come first, then a
worker that was killed or a host that is lost, then what workers report, and last those who only miss a peer.
"""

import logging
import secrets
import signal
import time
from collections import deque
from collections.abc import Container
from dataclasses import replace

import zmq

from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.hosts.hosts import Departed, Hosts
from mgpu.orchestrator.hosts.roster import HostsMissing, missing_text
from mgpu.orchestrator.processes.child_process import ChildProcess, describe_exit
from mgpu.orchestrator.processes.failures import HostLost, WorkerLost
from mgpu.orchestrator.processes.rank_reports import RankReports
from mgpu.protocol.internal.host_messages import StartWorker, WorkerEnded
from mgpu.protocol.internal.worker_messages import (
    CONTROL,
    AllocateCache,
    Joined,
    Shutdown,
    StepResult,
    WorkerFailure,
    WorkerSpec,
)
from mgpu.protocol.model.kv_pools import PoolSize

log = logging.getLogger(__name__)

GRACE_S = 1.0
"""How long to wait for other ranks' reports after the first sign of failure."""
START_S = 10.0
"""After so long an agent that says it runs no worker has not heard that it should."""
DEFAULT_PORT = 29500
_MISTAKE, _LOST, _REPORTED, _ENDED, _MISSES_PEER = range(5)


class HostGroup(RankReports):
    """All workers of one epoch. Use from the main thread only."""

    def __init__(self, hosts: Hosts, config: ServerConfig, epoch: int = 0) -> None:
        super().__init__()
        self.epoch = epoch
        self.world_size = config.layout.placement.world_size
        self.processes: list[ChildProcess] = []
        """None: they run on other hosts."""
        self._hosts = hosts
        self._config = config
        placement = config.layout.placement
        self._output_rank = placement.output_rank
        self._launched = [placement.place_of(rank).device for rank in range(self.world_size)]
        """The launcher's number of each rank of the plan."""
        self._incarnations: list[bytes] = []
        """Of the agents, by rank of the plan; empty: not all are there, and no worker has started."""
        self._results: deque[StepResult] = deque()
        self._failures: dict[int, tuple[int, WorkerLost]] = {}
        self._ended: set[int] = set()
        self._waits_since_s = self._started_s = 0.0
        self._captures_library = True

    @property
    def sockets(self) -> tuple["zmq.Socket[bytes]", ...]:
        return self._hosts.sockets

    @property
    def is_whole(self) -> bool:
        """Whether every rank is there."""
        return self._hosts.roster.is_whole

    @property
    def is_waiting(self) -> bool:
        """Whether ranks are missing, so that no worker has been started."""
        return not self._incarnations

    # -- start ---------------------------------------------------------------------------------------------------------

    def park(self) -> None:
        """Do nothing: processes in waiting would hold memory of other hosts."""

    def wake_up(self) -> None:
        """Do nothing: no process waits."""

    def start(self, captures_library: bool = True) -> None:
        """Have every rank start its worker as soon as all are there."""
        self._captures_library = captures_library
        self._waits_since_s = time.monotonic()
        self._start_if_whole()

    def _start_if_whole(self) -> None:
        roster = self._hosts.roster
        if not roster.is_whole:
            waited_s = time.monotonic() - self._waits_since_s
            if waited_s > self._hosts.join_timeout_s:
                raise HostsMissing(missing_text(roster, self._hosts.endpoint, self._hosts.join_timeout_s))
            return
        self._started_s = time.monotonic()
        self._incarnations = [roster.members[number].hello.incarnation for number in self._launched]
        self._hosts.order(self.epoch)
        first = roster.members[0].hello
        master, meeting = first.master or f"{first.address}:{DEFAULT_PORT}", secrets.token_hex(8)
        for rank, number in enumerate(self._launched):
            self._hosts.start(number, StartWorker(self._spec(rank, meeting), rank, master))

    def _spec(self, rank: int, meeting: str) -> WorkerSpec:
        roster = self._hosts.roster
        nodes = roster.hosts()
        hosts = tuple(nodes.index(roster.members[number].hello.node) for number in self._launched)
        joined = Joined(hosts, meeting, opens_store=self._launched[rank] == 0)
        spec = self._config.worker_spec(self.epoch, rank)
        return replace(spec, joined=joined, captures_library=self._captures_library)

    # -- messages ------------------------------------------------------------------------------------------------------

    def publish(self, data: bytes) -> None:
        """Send the same bytes to every rank. WorkerLost when a rank's connection is gone."""
        for rank, incarnation in enumerate(self._incarnations):
            if not self._hosts.send(self._launched[rank], incarnation, self.epoch, data):
                self._note(rank, _ENDED, "it closed its connection")
        if self._failures:
            raise self._first_failure()

    def allocate_cache(self, at_most: PoolSize | None = None) -> PoolSize:
        """Have all ranks allocate the smallest pools that any of them reported; return their size."""
        size = self.smallest_pools(at_most)
        self.publish(CONTROL.encode(AllocateCache(self.epoch, *size)))
        return size

    def try_result(self) -> StepResult | None:
        """Return the next step's result if it has come. WorkerLost if anything has failed."""
        if not self._results:
            self._read()
        return self._results.popleft() if self._results else None

    def take_in(self, _events: Container[object]) -> None:
        """Read messages and notice who is lost. WorkerLost for the first cause; HostsMissing if a rank stays away."""
        self._read()
        if self.is_waiting:
            self._start_if_whole()
            return
        if time.monotonic() - self._started_s > START_S:
            members = self._hosts.roster.members
            for rank, number in enumerate(self._launched):
                if number in members and members[number].hello.epoch != self.epoch:
                    self._note(rank, _LOST, "its host runs no worker of this epoch")
        if self._failures:
            raise self._first_failure()

    def _read(self) -> None:
        self._hear()
        if self._failures:
            raise self._first_failure()

    def _hear(self) -> None:
        """Take in all messages that have come; note failures."""
        for number, message in self._hosts.advance():
            if not self.is_waiting and number in self._launched:
                self._take(self._launched.index(number), message)

    def _take(self, rank: int, message: object) -> None:
        if isinstance(message, Departed):
            self._note(rank, _LOST, message.text, HostLost)
        elif getattr(message, "epoch", -1) != self.epoch:
            return
        elif isinstance(message, StepResult):
            if rank == self._output_rank:
                self._results.append(message)
        elif isinstance(message, WorkerEnded):
            self._ended.add(rank)
            kind = _LOST if message.status == -signal.SIGKILL else _ENDED
            self._note(rank, kind, f"the process {describe_exit(message.status)}")
        elif isinstance(message, WorkerFailure):
            self._note_failure(rank, message)
        else:
            self.keep(rank, message)

    # -- failure -------------------------------------------------------------------------------------------------------

    def broken(self, message: str) -> WorkerLost:
        """Return the failure of the output rank that sent an impossible result."""
        return self._lost(self._output_rank, message)

    def _lost(self, rank: int, message: str, failure: type[WorkerLost] = WorkerLost) -> WorkerLost:
        return failure(rank, self.phase_of(rank), message, time.monotonic())

    def _note(self, rank: int, kind: int, message: str, failure: type[WorkerLost] = WorkerLost) -> None:
        if rank not in self._failures or self._failures[rank][0] > kind:
            self._failures[rank] = kind, self._lost(rank, message, failure)

    def _note_failure(self, rank: int, failure: WorkerFailure) -> None:
        misses_peer = failure.message.startswith("PeerLost")
        kind = _MISTAKE if failure.is_mistake else _MISSES_PEER if misses_peer else _REPORTED
        lost = WorkerLost(
            rank, failure.phase, f"{self._host_of(rank)}{failure.message}", time.monotonic(), failure.traceback,
            failure.is_mistake,
        )  # fmt: skip
        known = self._failures.get(rank)
        if known is None or known[0] == _ENDED or kind < known[0]:
            self._failures[rank] = kind, lost

    def _host_of(self, rank: int) -> str:
        member = self._hosts.roster.members.get(self._launched[rank])
        return "" if member is None else f"on host {member.hello.host}: "

    def _first_failure(self) -> WorkerLost:
        """Wait shortly for the other ranks' reports, then return the failure that explains the others."""
        deadline_s = time.monotonic() + GRACE_S
        while len(self._failures) < self.world_size and not self._has_cause():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            zmq.select([*self.sockets], [], [], min(left_s, 0.1))
            self._hear()
        return min(self._failures.values(), key=lambda each: (each[0], each[1].at_s))[1]

    def _has_cause(self) -> bool:
        return any(kind in (_MISTAKE, _LOST) for kind, _ in self._failures.values())

    # -- stop ----------------------------------------------------------------------------------------------------------

    def stop(self, deadline_s: float, hurry_fd: int = -1) -> None:
        """Ask every worker to leave, wait for all of them, have the rest killed.

        The wait ends at CLOCK_MONOTONIC ``deadline_s`` or when ``hurry_fd`` is readable.
        """
        if len(self.ready) == self.world_size and not self._failures:
            for rank, incarnation in enumerate(self._incarnations):
                self._hosts.send(self._launched[rank], incarnation, self.epoch, CONTROL.encode(Shutdown(self.epoch)))
            sources: list[object] = [*self.sockets, *([hurry_fd] if hurry_fd >= 0 else [])]
            while len(self._ended) < self.world_size and (left_s := deadline_s - time.monotonic()) > 0:
                readable, _, _ = zmq.select(sources, [], [], min(left_s, 0.5))
                if hurry_fd in readable:
                    break
                self._hear()
        self.kill()

    def kill_with_stacks(self) -> None:
        """Have each rank write its stacks to standard error, then be killed."""
        self._hosts.order(-1, wants_stacks=True)

    def kill_at_once(self) -> None:
        """Have all ranks killed."""
        self._hosts.order(-1)

    def kill(self) -> None:
        """Have the workers that are left killed. A second call does nothing."""
        self._hosts.order(-1)
