"""The hosts of a server that an outside launcher starts: wait for all of them, hear them, tell them what to run."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from mgpu.orchestrator.host.server_keys import WorkerKeys
from mgpu.orchestrator.hosts.join_socket import JoinSocket
from mgpu.orchestrator.hosts.roster import (
    Expected,
    HostsError,
    HostsMissing,
    Member,
    Roster,
    missing_text,
    wrong_nodes_text,
)
from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.internal.counted import counted
from mgpu.protocol.internal.host_messages import (
    HOSTS,
    Hello,
    Leave,
    Orders,
    Refused,
    StartWorker,
    WorkerEnded,
    agent_identity,
    is_agent,
    worker_identity,
)
from mgpu.protocol.internal.worker_messages import CONTROL

log = logging.getLogger(__name__)

ORDERS_S = 0.5
"""Between two orders to an agent. Sending them is also how a lost connection is noticed."""
_LONGEST_SLEEP_S = 0.5


@dataclass(frozen=True, slots=True)
class Departed:
    """A member is lost: its connection, or anything heard of it, has ended."""

    text: str


Heard = tuple[int, object]
"""Rank of the launcher, and what its worker or its agent says: a message of CONTROL, `WorkerEnded` or `Departed`."""


class Hosts:
    """All hosts, through all epochs. For one thread. Use it as a context manager; leaving it lets the agents end."""

    def __init__(
        self,
        endpoint: str,
        keys: WorkerKeys,
        nodes: int,
        expected: Expected,
        join_timeout_s: float = 600.0,
        silence_s: float = 10.0,
    ) -> None:
        """Bind ``endpoint``. BindError if it cannot be."""
        self.roster = Roster(nodes, expected, silence_s)
        self.join_timeout_s = join_timeout_s
        self._socket = JoinSocket(endpoint, keys)
        self.endpoint = self._socket.endpoint
        self._epoch = -1
        self._wants_stacks = False
        self._orders_due_s = 0.0
        self._has_logged_garbage = False

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self.close("" if error is None else str(error) or type(error).__name__)

    @property
    def sockets(self) -> tuple["zmq.Socket[bytes]", ...]:
        return self._socket.sockets

    # -- start ---------------------------------------------------------------------------------------------------------

    def wait_for_all(self, stop_fd: int = -1) -> bool:
        """Return True when all ranks are there, False when ``stop_fd`` is readable before.

        HostsMissing at the deadline, HostsError if they are on fewer hosts than asked for.
        """
        log.info("waiting for the ranks of %s at %s", counted(self.roster.nodes, "host"), self.endpoint)
        deadline_s = time.monotonic() + self.join_timeout_s
        poller = zmq.Poller()
        for source in (*self.sockets, *([stop_fd] if stop_fd >= 0 else [])):
            poller.register(source, zmq.POLLIN)
        while not self.roster.is_whole:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise HostsMissing(missing_text(self.roster, self.endpoint, self.join_timeout_s))
            if stop_fd in dict(poller.poll(int(min(left_s, _LONGEST_SLEEP_S) * 1000) + 1)):
                return False
            for _ in self.advance():
                pass  # no worker runs, so nothing of one counts
        if len(self.roster.hosts()) != self.roster.nodes:
            raise HostsError(wrong_nodes_text(self.roster))
        self.roster.fixed_world_size = self.roster.world_size
        return True

    # -- messages ------------------------------------------------------------------------------------------------------

    def advance(self) -> Iterator[Heard]:
        """Take in what has come, and yield what concerns workers; give orders when it is time."""
        for identity, data in self._socket.receive():
            heard = self._of_agent(identity, data) if is_agent(identity) else self._of_worker(identity, data)
            if heard is not None:
                yield heard
        if time.monotonic() >= self._orders_due_s:
            yield from self._give_orders()
        for member in self.roster.silent():
            yield self._depart(member, f"nothing was heard of it for {self.roster.silence_s:g} s")

    def order(self, epoch: int, wants_stacks: bool = False) -> None:
        """Have workers of ``epoch`` and no others: -1 for none. Agents hear it at once."""
        self._epoch, self._wants_stacks = epoch, wants_stacks
        for member in self.roster.members.values():
            self._tell(member, Orders(epoch, self.roster.silence_s, wants_stacks))

    def start(self, rank: int, order: StartWorker) -> None:
        """Have the agent of a rank start a worker. What cannot be sent is noticed by the next orders."""
        self._tell(self.roster.members[rank], order)

    def send(self, rank: int, incarnation: bytes, epoch: int, data: bytes) -> bool:
        """Send to a worker. Return False if its connection is gone."""
        return self._socket.send(worker_identity(incarnation, epoch), data)

    def _of_agent(self, identity: bytes, data: bytes) -> Heard | None:
        try:
            message = HOSTS.decode(data)
        except CodecError as error:
            text = f"this process does not speak as mgpu {self.roster.expected.version} does: {error}"
            self._refuse(identity, text)
            return None
        if isinstance(message, Hello) and identity == agent_identity(message.incarnation):
            self._take_hello(identity, message)
            return None
        member = self._member_of(identity)
        if member is None or not isinstance(message, WorkerEnded):
            return None
        return member.hello.rank, message

    def _take_hello(self, identity: bytes, hello: Hello) -> None:
        before = self.roster.members.get(hello.rank)
        if problem := self.roster.take(hello):
            self._refuse(identity, problem)
            return
        now = self.roster.members.get(hello.rank)
        if before is None and now is not None:
            missing = self.roster.missing()
            rest = f"; missing: {', '.join(map(str, missing))}" if missing else "; all ranks are there"
            log.info("joined: %s%s", hello.name, rest)
            self._tell(now, Orders(self._epoch, self.roster.silence_s, self._wants_stacks))

    def _refuse(self, identity: bytes, text: str) -> None:
        log.warning("refused %s", text)
        self._socket.send(identity, HOSTS.encode(Refused(text)))

    def _of_worker(self, identity: bytes, data: bytes) -> Heard | None:
        member = self._member_of(identity)
        if member is None:
            return None
        try:
            return member.hello.rank, CONTROL.decode(data)
        except CodecError as error:
            if not self._has_logged_garbage:
                self._has_logged_garbage = True
                log.warning("ignored what is no message of the worker of %s: %s", member.hello.name, error)
            return None

    def _member_of(self, identity: bytes) -> Member | None:
        incarnation = identity[1:9]
        members = self.roster.members.values()
        return next((member for member in members if member.hello.incarnation == incarnation), None)

    def _give_orders(self) -> Iterator[Heard]:
        self._orders_due_s = time.monotonic() + ORDERS_S
        for member in list(self.roster.members.values()):
            if not self._tell(member, Orders(self._epoch, self.roster.silence_s, self._wants_stacks)):
                yield self._depart(member, "its connection is gone")

    def _depart(self, member: Member, why: str) -> Heard:
        self.roster.drop(member.hello.rank)
        text = f"{member.hello.name} is lost: {why}"
        log.warning("%s", text)
        return member.hello.rank, Departed(text)

    def _tell(self, member: Member, message: object) -> bool:
        return self._socket.send(agent_identity(member.hello.incarnation), HOSTS.encode(message))

    def close(self, failure: str = "") -> None:
        """Let all agents end, and close the socket; a second call does nothing."""
        for member in self.roster.members.values():
            self._tell(member, Leave(failure))
        self.roster.members.clear()
        self._socket.close()
