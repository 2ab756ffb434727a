"""Every open connection of the front socket: whose it is, and which ones are ended.

libzmq accepts connections by itself, as many as come. Its monitor reports the descriptor of each;
`transport/descriptors.py` says whose it is and ends it. Ended are

- connections that have not proven who they are, beyond a number for each address and for all, and those that take
  long for it while memory is tight: libzmq keeps up to --max-request-bytes of each, unseen, for
  `framing.HANDSHAKE_TIMEOUT_MS`. Chance decides which: an honest handshake takes milliseconds, and is hit as rarely as
  it is short.
- connections beyond what the limit of open files leaves: at the limit libzmq aborts the process. The owner with the
  most goes first, and of its connections those that have never said anything. `transport/accept_gate.py`
  keeps libzmq from accepting more than can be ended in time.
- connections that send a message without an end, or more than is read (`transport/endless.py`, `transport/floods.py`).
- connections of an owner beyond its own number, after they were told (`check`).

An *origin* is what is known at once: ``pid:N`` on ipc, an address on tcp. The *owner* is the origin, until the
transport has proven a key. libzmq does not say which connection has just completed its handshake. The oldest that has
not is taken for it (with keys: the oldest of the same address), until its first message tells.
"""

import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import zmq

from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.front.transport.accept_gate import AcceptGate
from mgpu.orchestrator.gateway.front.transport.descriptors import (
    PROCESS,
    Ender,
    has_left,
    inode_and_origin,
    received_bytes,
    unread_bytes,
)
from mgpu.orchestrator.gateway.front.transport.endless import EndlessMessages
from mgpu.orchestrator.gateway.front.transport.floods import Floods
from mgpu.orchestrator.gateway.front.transport.io_threads import IoThreads
from mgpu.orchestrator.gateway.front.transport.open_connection import OpenConnection, excess
from mgpu.orchestrator.gateway.front.transport.pipe_room import PipeRoom
from mgpu.protocol.front.framing import HANDSHAKE_TIMEOUT_MS

MAX_UNPROVEN_OF_ADDRESS = 256
MAX_UNPROVEN = 4096
SLOW_HANDSHAKE_S = 0.1
HANDSHAKE_S = HANDSHAKE_TIMEOUT_MS / 1000
"""A connection that is open for longer has proven itself: else libzmq would have ended it."""
GOODBYE_S = 1.0
"""Time for the answer that says why a connection ends."""
CHECK_INTERVAL_S = 0.25
EVENTS_PER_TURN = 2000
KEPT_SHARE, MOST_SHARE = 0.95, 1.1
"""Of the connections that are possible: so many stay when there are more, and so many are accepted at all."""
FREE_SHARE, LEAST_FREE = 0.25, 1000
"""While no more than this share is open, and it is so many, libzmq accepts connections as they come."""
MANY = 64
"""Connections of one owner; honest programs rarely have so many."""
SAMPLES, SAMPLE_S = 10, 0.001
_MONITOR = "inproc://front-monitor"
_EVENTS = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
_GATE_S = 0.05


class Connections:
    """The table of open connections, kept by the events of libzmq's monitor."""

    def __init__(
        self,
        context: "zmq.Context[Any]",
        router: "zmq.Socket[Any]",
        max_open: int,
        has_keys: bool,
        io_threads: IoThreads | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it before ``router`` is bound. ``max_open``: all that the process has descriptors for."""
        self.max_of_key = self.max_open = max_open
        self._router = router
        self._clock_s = clock_s
        self._open: dict[int, OpenConnection] = {}
        self._by_name: dict[bytes, OpenConnection] = {}
        self._unproven: defaultdict[str, dict[int, OpenConnection]] = defaultdict(dict)
        """By origin, the oldest first."""
        self._in_handshake: dict[int, OpenConnection] = {}
        """The same, of all origins."""
        self._has_keys = has_keys
        self._counts: Counter[str] = Counter()
        """By owner."""
        self._ending: list[OpenConnection] = []
        self._closing: set[int] = set()
        """Descriptors of ended connections that libzmq has not closed yet."""
        self._gate = AcceptGate()
        self.is_shut_out: Callable[[str], bool] = lambda _origin: False
        """Such a connection is ended before libzmq reads of it."""
        self._num_accepted = 0
        """Since `take_accepted` was called."""
        self._next_check_s = 0.0
        self._random = random.Random()
        self._ender, self._pipes = Ender(), PipeRoom(None, io_threads)
        self._endless, self._floods = EndlessMessages(), Floods()
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.setsockopt(zmq.LINGER, 0)
        self.monitor.setsockopt(zmq.RCVHWM, 0)  # at a limit libzmq's own thread would wait for this one
        router.monitor(_MONITOR, _EVENTS)
        self.monitor.connect(_MONITOR)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_unproven(self) -> int:
        return len(self._in_handshake)

    def count_for(self, connection: bytes) -> tuple[int, int]:
        """Return the number of open connections, and of those that have the same owner as this one."""
        return len(self._open), self._counts[self.owner_of(connection)]

    def owner_of(self, connection: bytes) -> str:
        """Return whose a connection is that has sent a message; empty if that is not known."""
        found = self._by_name.get(connection)
        return "" if found is None else found.owner

    def named(self, connection: bytes) -> OpenConnection | None:
        """Return an open connection that has sent a message."""
        return self._by_name.get(connection)

    def has_room(self, connection: bytes, nbytes: int) -> bool:
        """Return whether libzmq may be handed so many bytes more for a connection, and count them then."""
        found = self._by_name.get(connection)
        return found is None or self._pipes.take(found, nbytes)

    def give_back_room(self, connection: bytes, nbytes: int) -> None:
        """Count so many bytes less again, because libzmq did not accept them."""
        if (found := self._by_name.get(connection)) is not None:
            self._pipes.give_back(found, nbytes)

    def flooding(self) -> str:
        """Return the owner who seems to have filled the memory; empty if that cannot be seen. It takes some ms.

        It is the one whose bytes wait in the kernel because they come faster than libzmq reads. If nobody's do, it is
        the one that has sent the most without a whole message, or the only one that has not sent a whole message, or
        the one that has many connections and most of all: libzmq keeps what their handshakes say of them.
        """
        return (
            self._largest(unread_bytes, self._open.values(), SAMPLES)
            or self._largest_without_message()
            or self._most_connected()
        )

    def _most_connected(self) -> str:
        [(owner, count)] = self._counts.most_common(1) or [("", 0)]
        return owner if count >= MANY and 2 * count > len(self._open) else ""

    def _largest_without_message(self) -> str:
        silent = [each for each in self._open.values() if not each.name]
        owners = {each.owner for each in silent}
        return owners.pop() if len(owners) == 1 else self._largest(received_bytes, silent, 1)

    def _largest(self, measure: Callable[[int], int], among: Iterable[OpenConnection], samples: int) -> str:
        sums: Counter[str] = Counter()
        for _ in range(samples):
            for each in among:
                with suppress(OSError):  # libzmq has closed it
                    sums[each.owner] += measure(each.fd)
            time.sleep(SAMPLE_S)
        [(owner, nbytes)] = sums.most_common(1) or [("", 0)]
        return owner if nbytes else ""

    # ------------------------------------------------------------ what happens

    def update(self, admitted: Iterable[tuple[str, str]]) -> None:
        """Take in what has happened, and end what is too much. Call it in every turn.

        ``admitted`` are origin and owner of the connections that access control has let in since the last call.
        """
        now_s = self._clock_s()
        self._read_events(now_s)
        for origin, owner in admitted:
            if owner != origin:  # without a key access control is asked before the handshake
                self._prove_oldest(self._unproven.get(origin, {}), owner)
        self._bound_unproven(now_s)
        self._bound_open()
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + CHECK_INTERVAL_S
            self._end_due(now_s)

    def end_slow_handshakes(self) -> None:
        """End what has been open for a while and has not proven anything: libzmq may hold a megabyte of each."""
        oldest_s = self._clock_s() - SLOW_HANDSHAKE_S
        for found in [each for each in self._in_handshake.values() if each.since_s < oldest_s]:
            self._end(found)

    def on_bound(self) -> None:
        """Begin to bound what is accepted; call it when the socket was bound."""
        deadline_s = self._clock_s() + _GATE_S
        self.accept_more()
        while not self._gate.is_complete and self._clock_s() < deadline_s:
            self.update(())
            self.accept_more()

    def hear(self, connection: bytes) -> tuple[str, str] | None:
        """Note a message of a connection; return its identity and owner, None if it has to be introduced first."""
        known = self._by_name.get(connection)
        if known is None:
            return None
        known.is_heard = True
        known.num_heard += 1
        return known.peer

    def introduce(self, connection: bytes, frame: zmq.Frame, origin: str, owner: str, identity: str = "") -> bool:
        """Note whose ``connection`` is by a ``frame`` of its message; return False if it has ended."""
        try:
            fd = int(frame.get("__fd"))
        except (zmq.ZMQError, ValueError):  # not from a descriptor
            return True
        if fd not in self._open:
            self._read_events(self._clock_s(), sys.maxsize)
        found = self._open.get(fd)
        if found is None or found.origin != origin:  # else another has its descriptor now
            return found is not None
        self._prove(found, owner, is_bounded=not found.name)  # else it may be named by what another has left behind
        self._by_name.pop(found.name, None)
        found.name, found.peer, found.is_heard = connection, (identity, owner), True
        self._by_name[connection] = found
        return True

    def end(self, connection: bytes) -> bool:
        """End a connection that has sent a message; return False if it has ended already."""
        if (found := self._by_name.get(connection)) is not None:
            self._end(found)
        return found is not None

    def end_endless(self, worked_s: float) -> list[str]:
        """End the connections that send without an end, and return the owners of those that send one such message.

        ``worked_s`` is the CPU time of libzmq's threads so far.
        """
        found = self._endless.look(worked_s, self._open.values())
        for each in (*found, *self._floods.look(self._open.values())):
            self._end(each)
        return [each.owner for each in found]

    def end_if_left(self, connection: bytes) -> bool:
        """End a connection that has sent a message if its peer is gone; return whether it has ended, now or before.

        libzmq would hand out all that has come before, on tcp some megabytes of short messages.
        """
        found = self._by_name.get(connection)
        if found is not None:
            if not has_left(found.fd):
                return False
            self._end(found)
        return True

    def check(self, connection: bytes) -> None:
        """Raise Refusal if a connection that has sent a message may not stay; it is ended a moment later."""
        found = self._by_name.get(connection)
        if found is not None and found.end_at_s is not None:
            most, count = self._most_of(found.owner), self._counts[found.owner]
            text = f"this client has {count} connections, the limit is {most}; close some, or let programs share one"
            raise Refusal("overloaded", text, RETRY_AFTER_S)

    def _read_events(self, now_s: float, most: int = EVENTS_PER_TURN) -> None:
        for _ in range(most):
            try:
                data = self.monitor.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            event, fd = int.from_bytes(data[:2], "little"), int.from_bytes(data[2:6], "little")
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if not self._has_keys:
                    self._prove_oldest(self._in_handshake)
                continue
            self._closing.discard(fd)
            if fd in self._open:
                self._forget(self._open[fd])
            if event == zmq.EVENT_LISTENING:
                self._gate.add(fd)
            elif event == zmq.EVENT_ACCEPTED:
                with suppress(OSError):  # it has ended already
                    self._add(fd, now_s)

    def take_accepted(self) -> int:
        """Return how many connections were accepted since the last call."""
        count, self._num_accepted = self._num_accepted, 0
        return count

    def _add(self, fd: int, now_s: float) -> None:
        self._num_accepted += 1
        inode, origin = inode_and_origin(fd)
        found = OpenConnection(fd, inode, origin, origin, now_s)
        self._open[fd] = self._unproven[origin][fd] = self._in_handshake[fd] = found
        self._counts[origin] += 1
        if self.is_shut_out(origin):
            self._end(found)

    def _prove_oldest(self, waiting: dict[int, OpenConnection], owner: str = "") -> None:
        for found in waiting.values():
            self._prove(found, owner or found.origin)
            return

    def _prove(self, found: OpenConnection, owner: str, is_bounded: bool = True) -> None:
        """Note that a connection has proven to be ``owner``'s; if that is one too many, it has to go."""
        found.is_proven = True
        self._leave_unproven(found)
        if found.owner != owner:
            self._uncount(found)
            found.owner = owner
            self._counts[owner] += 1
        if is_bounded and self._counts[owner] > self._most_of(owner):
            self._end_soon(found)

    def _most_of(self, owner: str) -> int:
        """Return how many connections an owner may have. An address may be that of many, so it may have all."""
        if owner.startswith(PROCESS):
            return max(self.max_of_key, self.max_open // 2)
        return self.max_of_key if owner.startswith("key:") else self.max_open

    def _forget(self, found: OpenConnection) -> None:
        del self._open[found.fd]
        self._pipes.free(found)
        self._leave_unproven(found)
        self._uncount(found)
        if self._by_name.get(found.name) is found:
            del self._by_name[found.name]

    def _uncount(self, found: OpenConnection) -> None:
        self._counts[found.owner] -= 1
        if not self._counts[found.owner]:
            del self._counts[found.owner]

    def _leave_unproven(self, found: OpenConnection) -> None:
        self._in_handshake.pop(found.fd, None)
        of_origin = self._unproven.get(found.origin, {})
        if of_origin.pop(found.fd, None) is not None and not of_origin:
            del self._unproven[found.origin]

    # -------------------------------------------------------- what is too much

    def _bound_unproven(self, now_s: float) -> None:
        for origin, waiting in list(self._unproven.items()):
            for old in [each for each in waiting.values() if now_s - each.since_s > HANDSHAKE_S]:
                self._prove(old, old.owner)
            most = MAX_UNPROVEN if origin.startswith(PROCESS) else MAX_UNPROVEN_OF_ADDRESS
            self._end_any(origin, len(waiting) - most)
        while self.num_unproven > MAX_UNPROVEN:
            self._end_any(max(self._unproven, key=lambda origin: len(self._unproven[origin])), 1)

    def _end_any(self, origin: str, count: int) -> None:
        if count > 0:
            for found in self._random.sample(list(self._unproven[origin].values()), count):
                self._end(found)

    def _bound_open(self) -> None:
        if len(self._open) > self.max_open:
            for found in excess(self._open.values(), int(self.max_open * KEPT_SHARE)):
                self._end(found)

    def accept_more(self, is_behind: bool = False) -> None:
        """Let libzmq accept one more connection, or as many as come. Call it whenever messages were read.

        While the gateway ``is_behind`` with reading, it is one. What a new connection brings can be read until the next
        is accepted, however many come, and those that are open are heard as before.
        """
        num_open = len(self._open) + len(self._closing)
        free = self.max_open * FREE_SHARE
        if num_open <= free and free >= LEAST_FREE and not is_behind:
            self._gate.set(one_at_a_time=False)
        elif num_open < int(self.max_open * MOST_SHARE):
            self._gate.set(one_at_a_time=True)

    def _end_due(self, now_s: float) -> None:
        due = [each for each in self._ending if each.end_at_s is not None and each.end_at_s <= now_s]
        self._ending = self._ending[len(due) :]  # all have waited equally long
        for found in due:
            self._end(found)

    def _end_soon(self, found: OpenConnection) -> None:
        if found.end_at_s is None:
            found.end_at_s = self._clock_s() + GOODBYE_S
            self._ending.append(found)

    def _end(self, found: OpenConnection) -> None:
        if self._open.get(found.fd) is found:
            self._forget(found)
            self._closing.add(found.fd)
            self._ender.end(found.fd, found.inode)

    def close(self) -> None:
        self._router.monitor(None, 0)
        self.monitor.close()
        self._ender.close()
