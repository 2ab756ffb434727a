"""The public socket: receive hostile frames, send without ever waiting, notice clients that vanish or do not read."""

import logging
import os
import resource
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import zmq

from mgpu.orchestrator.gateway.front.access import DOMAIN, AccessControl, origin_of, owner_of
from mgpu.orchestrator.gateway.front.account import Account, account_of
from mgpu.orchestrator.gateway.front.batches import Batches
from mgpu.orchestrator.gateway.front.connections import Connections
from mgpu.orchestrator.gateway.front.endpoint import BindError, bind, is_lost, release
from mgpu.orchestrator.gateway.front.hidden_options import seed_routing_ids, set_hidden_options
from mgpu.orchestrator.gateway.front.pace import BYTE_S, FRAME_S
from mgpu.orchestrator.gateway.front.transport.io_threads import IoThreads, threads_of_process
from mgpu.protocol.front import framing
from mgpu.protocol.front.client_messages import REQUEST_ID
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.frames import send_message_to
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.keys import use_server_key

MAX_BACKLOG_BYTES = 4 << 20
"""Per connection, beyond what its pipe holds (the HWM, and pipe_room.py)."""
MAX_TOTAL_BACKLOG_BYTES = 256 << 20
"""Of all connections; beyond it the one that is furthest behind is given up."""
CHECK_INTERVAL_S = 2.0
CONNECTIONS_SHARE = 0.8
"""Of the files that the process may open; the rest is for what libzmq accepts before it is counted."""
FRAMES_PER_TURN = 2000
"""Read in one turn of the gateway's loop, of all messages: a few milliseconds."""

_NOBLOCK = int(zmq.NOBLOCK)
"""As a number: sums of pyzmq's own flags take longer than a frame."""

log = logging.getLogger(__name__)

Loss = Literal["gone", "slow", "flooding"]


class Received(NamedTuple):
    """One message from a client."""

    connection: bytes
    frames: list[bytes]
    """At most ``framing.MAX_FRAMES`` + 1."""
    identity: str
    """What the transport proved; see account.py."""
    owner: str
    client: str = ""
    """The client that the message names."""
    is_open: bool = True
    """False: its connection has ended, and nobody waits for an answer."""

    @property
    def account(self) -> Account:
        return account_of(self.identity, self.connection, self.owner, self.client)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.frames))


@dataclass(slots=True)
class _Backlog:
    bodies: deque[bytes] = field(default_factory=deque)
    size: int = 0


class FrontSocket:
    """ROUTER of the front channel, its ZAP handler and the messages that wait for slow readers."""

    def __init__(
        self,
        context: "zmq.Context[Any]",
        endpoint: str,
        max_bytes: int,
        keys: ServerKeys | None = None,
        own_key: bytes = b"",
    ) -> None:
        """Bind ``endpoint``; BindError when that is impossible or not allowed. With ``keys``, tcp is encrypted."""
        others = threads_of_process()
        self.access = AccessControl(context, None if keys is None else keys.clients, own_key)
        self.io_threads = IoThreads(threads_of_process() - others)
        seed_routing_ids()
        self.socket = context.socket(zmq.ROUTER)
        has_keys = keys is not None and endpoint.startswith("tcp://")
        if keys is not None and has_keys:
            use_server_key(self.socket, keys.secret)
        framing.set_server_options(self.socket, max_bytes)
        self.socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        set_hidden_options(context, self.socket)
        self.connections = Connections(context, self.socket, _room_for_connections(), has_keys, self.io_threads)
        self.connections.is_shut_out = self.access.shut_out.has
        self._limits = replace(framing.FROM_CLIENT, frame_bytes=max_bytes)
        self._backlogs: dict[bytes, _Backlog] = {}
        self._backlog_bytes = 0
        self._batches = Batches(self._send_now)
        self._lost: dict[bytes, Loss] = {}
        self._skipped_from = (b"", "")
        """Connection and owner of the message that is skipped."""
        self._frames_left, self._receiving_s = FRAMES_PER_TURN, 0.0
        self.is_skipping = False
        """The rest of a message with too many frames is still to be read, and dropped."""
        self._next_check_s, self._failed_binds = 0.0, 0
        try:
            self.endpoint, self._lock = bind(self.socket, endpoint, has_keys=keys is not None)
        except BaseException:
            self.close_sockets()
            raise
        self.connections.on_bound()

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlogs)

    def restore_endpoint(self) -> None:
        """Bind again if something has removed the socket file; log once if this is impossible. Call it often.

        Connections are not touched. What listened to the old file stays with libzmq, idle, until the end.
        """
        now_s = time.monotonic()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + CHECK_INTERVAL_S
        if not is_lost(self.endpoint, self._lock):
            return
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        try:
            _, self._lock = bind(self.socket, self.endpoint)
        except BindError as error:
            self._failed_binds += 1
            if self._failed_binds == 2:  # the first time the parent may be about to make the folder again
                log.error("something has removed the socket, and nobody can connect: %s", error)
        else:
            self._failed_binds = 0
            log.warning("something has removed the socket; listening on %s again", self.endpoint)

    def admit(self) -> None:
        """Answer the handshakes that wait, take in who has connected or left, and end what is too much."""
        self.access.answer_requests()
        self.connections.update(self.access.take_admitted())
        for owner in self.connections.end_endless(self.io_threads.worked_s()):
            self.access.shut_out.strike(owner)

    def begin_turn(self) -> None:
        """Let `receive` read another `FRAMES_PER_TURN` frames."""
        self._frames_left = FRAMES_PER_TURN

    def check(self, received: Received) -> None:
        """Raise Refusal if this client, or one with so many connections, is not served."""
        self.access.check(received.identity)
        self.connections.check(received.connection)

    def receive(self) -> Received | None:
        """Return the next message; None if none is waiting, or if this turn has read all the frames that it may.

        A message with too many frames is returned, without its rest, after the first `framing.MAX_FRAMES` + 1. The
        socket has all of its frames, and gives no other message before they are read. The next calls drop them, in as
        many turns as it takes.
        """
        self._skip()
        if self._frames_left <= 0:
            return None
        try:
            connection = self.socket.recv(_NOBLOCK)
        except zmq.Again:
            return None
        frames: list[bytes] = []
        known, is_open = self.connections.hear(connection), True
        identity, owner = known or ("", "")
        has_more = True  # of a ROUTER: at least one frame follows that with the name of the connection
        while has_more and len(frames) <= framing.MAX_FRAMES:
            frame = self.socket.recv(_NOBLOCK, copy=False)
            if known is None and not frames:  # asking libzmq takes longer than receiving a short message
                identity, origin, owner = _peer_of(_property_of(frame, "User-Id"), _property_of(frame, "Peer-Address"))
                is_open = self.connections.introduce(connection, frame, origin, owner, identity)
            frames.append(frame.bytes)
            has_more = frame.more
        if has_more:
            self.is_skipping, self._skipped_from = True, (connection, owner)
        received = Received(connection, frames, identity, owner, "", is_open)
        self._note_received(1 + len(frames), received.nbytes)
        return received

    def _skip(self) -> None:
        """Drop the rest of a message, and end its connection if its owner has sent too many such frames."""
        before, (connection, owner) = self._frames_left, self._skipped_from
        while self.is_skipping and self._frames_left > 0:
            self._frames_left -= 1  # not charged beyond its time: everybody waits behind it
            self.is_skipping = self.socket.recv(zmq.NOBLOCK, copy=False).more
        num_skipped, shut_out = before - self._frames_left, self.access.shut_out
        if num_skipped and not shut_out.tolerates(owner, num_skipped) and self.connections.end(connection):
            shut_out.strike(owner)

    def _note_received(self, num_frames: int, nbytes: int) -> None:
        self._frames_left -= num_frames
        self._receiving_s += FRAME_S * num_frames + BYTE_S * nbytes

    def take_receiving_s(self) -> float:
        """Return about how long libzmq's thread has worked on what was received since the last call."""
        seconds, self._receiving_s = self._receiving_s, 0.0
        return seconds

    def unpack(self, frames: list[bytes]) -> dict[object, object]:
        """Decode the frames of a message. WireError for anything else."""
        return framing.unpack(frames, self._limits)

    def send(self, connection: bytes, values: Mapping[str, object]) -> None:
        """Send one message or keep it for later; never waits, never raises. See `take_lost`."""
        self.send_body(connection, framing.pack(values)[1])

    def send_body(self, connection: bytes, body: bytes) -> None:
        """Send a message, of which ``body`` is the map, as `send` does."""
        found = self.connections.named(connection)
        if found is not None and found.takes_batches:
            if connection not in self._lost:
                self._batches.add(connection, body)
        else:
            self._send_now(connection, body)

    def take_batches(self, connection: bytes) -> None:
        """Send a connection several messages at once from now on."""
        if (found := self.connections.named(connection)) is not None:
            found.takes_batches = True

    def send_batches(self) -> None:
        """Send what was kept for clients that read several messages at once. Call it at the end of a turn."""
        self._batches.send()

    def _send_now(self, connection: bytes, body: bytes) -> None:
        if connection in self._lost:
            return  # its backlog was thrown away: a later message would hide that something is missing
        backlog = self._backlogs.get(connection)
        if backlog is None:
            if self._try_send(connection, body):
                return
            backlog = self._backlogs.setdefault(connection, _Backlog())
        backlog.bodies.append(body)
        self._add(backlog, len(body))
        if backlog.size > MAX_BACKLOG_BYTES:
            self._give_up(connection)
        elif self._backlog_bytes > MAX_TOTAL_BACKLOG_BYTES:
            self._give_up(max(self._backlogs, key=lambda each: self._backlogs[each].size))

    def _add(self, backlog: _Backlog, size: int) -> None:
        backlog.size += size
        self._backlog_bytes += size

    def _give_up(self, connection: bytes) -> None:
        backlog = self._backlogs.pop(connection)
        self._batches.drop(connection)
        self._add(backlog, -backlog.size)
        self._lost[connection] = "slow"

    def drop_sender(self, connection: bytes) -> None:
        """Send a connection nothing more of what was meant for it, because its own messages were dropped."""
        if connection in self._backlogs:
            self._give_up(connection)
        self._batches.drop(connection)
        self._lost.setdefault(connection, "flooding")

    def flush(self) -> None:
        """Send what waits: the batches of this turn, and messages for slow readers."""
        self.send_batches()
        for connection, backlog in list(self._backlogs.items()):
            while backlog.bodies and self._try_send(connection, backlog.bodies[0]):
                self._add(backlog, -len(backlog.bodies.popleft()))
            if not backlog.bodies or self._lost.get(connection) == "gone":
                self._add(backlog, -backlog.size)
                del self._backlogs[connection]

    def take_lost(self) -> dict[bytes, Loss]:
        """Return the connections that were found gone, or were given up, since the last call."""
        lost, self._lost = self._lost, {}
        return lost

    def _try_send(self, connection: bytes, body: bytes) -> bool:
        """Send without waiting; False if the peer's pipe is full. A message to a vanished peer counts as sent."""
        if not self.connections.has_room(connection, len(body)):
            return False
        try:
            send_message_to(self.socket, connection, framing.VERSION, body)
        except zmq.Again:
            self.connections.give_back_room(connection, len(body))
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._lost[connection] = "gone"
        return True

    def close_sockets(self) -> None:
        self.connections.close()
        self.socket.close()
        self.access.close()

    def close(self) -> None:
        """Close the socket, letting libzmq flush for a moment, and free the endpoint."""
        self.close_sockets()
        release(self.endpoint, self._lock)


def _room_for_connections() -> int:
    """Return how many connections the limit of open files leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, int(soft * CONNECTIONS_SHARE) - len(os.listdir("/proc/self/fd")))


@lru_cache(4096)
def _peer_of(identity: str, address: str) -> tuple[str, str, str]:
    """Return identity, origin and owner of a peer by the properties of its frames."""
    origin = origin_of(address)
    return identity, origin, owner_of(identity, origin)


def _property_of(frame: zmq.Frame, name: str) -> str:
    """Return the identity that access control gave the peer (User-Id), or the kernel's name of it (Peer-Address).

    Every frame of its connection carries both, also those that are read after the connection has ended.
    """
    try:
        return str(frame.get(name))
    except zmq.ZMQError:  # the property is missing: it is empty
        return ""


def id_of(data: dict[object, object]) -> int | None:
    """Return the id of a message that may be wrong in everything else; None if that is wrong too."""
    try:
        return REQUEST_ID.parse("id", data.get("id"))
    except FieldError:
        return None
