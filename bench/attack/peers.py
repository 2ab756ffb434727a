"""Connections of an attacker: what a few lines of stock pyzmq, or a plain socket, can do to a front channel."""

import itertools
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import zmq

from mgpu.protocol.keys import read_client_keys, use_client_keys

VERSION = b"mgpu1"
FRAME_BYTES = 1 << 20


@dataclass
class Cost:
    """What an attack takes of its attacker."""

    messages: int = 0
    nbytes: int = 0
    connections: int = 0


def _context() -> "zmq.Context[zmq.Socket[bytes]]":
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 10_000)
    return context


@dataclass
class Attacker:
    """One attacking process: where the server is, its key if it has one, and what it has spent."""

    endpoint: str
    key_file: Path | None
    strength: int
    cost: Cost = field(default_factory=Cost)
    context: "zmq.Context[zmq.Socket[bytes]]" = field(default_factory=_context)
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def connect(
        self, routing_id: bytes | None = None, unread: int = 1000, heartbeat_ms: int = 0, reads_ahead: bool = True
    ) -> "zmq.Socket[bytes]":
        """Return a DEALER that never waits; a message that finds no room is dropped by `say`."""
        found = self.context.socket(zmq.DEALER)
        found.setsockopt(zmq.LINGER, 0)
        found.setsockopt(zmq.SNDHWM, unread)
        found.setsockopt(zmq.RECONNECT_IVL, 50)
        if heartbeat_ms or not reads_ahead:
            found.setsockopt(zmq.RCVHWM, 1)
        if not reads_ahead:
            found.setsockopt(zmq.RCVBUF, 1 << 16)
        if heartbeat_ms:
            found.setsockopt(zmq.HEARTBEAT_IVL, heartbeat_ms)
            found.setsockopt(zmq.HEARTBEAT_TIMEOUT, 60_000)
        if routing_id is not None:
            found.setsockopt(zmq.ROUTING_ID, routing_id)
        if self.key_file is not None:
            use_client_keys(found, read_client_keys(self.key_file))
        found.connect(self.endpoint)
        self.cost.connections += 1
        return found

    def connect_many(self, count: int) -> "list[zmq.Socket[bytes]]":
        return [self.connect() for _ in range(count * self.strength)]

    def say(self, peer: "zmq.Socket[bytes]", **fields: object) -> bool:
        """Send one message with a new id unless ``fields`` has one; False when the connection takes no more."""
        return self.send(peer, [VERSION, msgpack.packb({"id": next(self._ids), **fields})])

    def send(self, peer: "zmq.Socket[bytes]", frames: list[bytes]) -> bool:
        try:
            peer.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.cost.messages += 1
        self.cost.nbytes += sum(map(len, frames))
        return True

    @contextmanager
    def raw(self) -> Iterator[socket.socket]:
        """Open a plain socket to the server, for bytes that no library would send."""
        with self.open() as found:
            yield found

    def open(self, receive_bytes: int = 0) -> socket.socket:
        """Return a plain socket to the server. The caller closes it."""
        found = socket.socket(socket.AF_UNIX if self.endpoint.startswith("ipc://") else socket.AF_INET)
        try:
            if receive_bytes:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            found.settimeout(5.0)
            found.connect(address_of(self.endpoint))
        except BaseException:
            found.close()
            raise
        self.cost.connections += 1
        return found

    @property
    def secret(self) -> str:
        """Return the API key; for attacks on HTTP."""
        assert self.key_file is not None
        return self.key_file.read_text().strip()

    def write(self, peer: socket.socket, data: bytes) -> None:
        peer.sendall(data)
        self.cost.nbytes += len(data)

    def close(self) -> None:
        self.context.destroy(linger=0)


def drain(peer: "zmq.Socket[bytes]") -> None:
    """Throw away what the server has answered."""
    while peer.poll(0):
        peer.recv_multipart(zmq.NOBLOCK)


def address_of(endpoint: str) -> str | tuple[str, int]:
    """Return what `socket.connect` takes."""
    if endpoint.startswith("ipc://"):
        return endpoint.removeprefix("ipc://")
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def greeting(mechanism: bytes) -> bytes:
    """Return the 64 bytes with which a ZMTP 3.0 peer begins."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def command(body: bytes) -> bytes:
    """Frame a ZMTP command of any length."""
    return b"\x06" + struct.pack(">Q", len(body)) + body


def null_handshake(kind: bytes = b"DEALER") -> bytes:
    """Return all that a peer without keys sends before its first message."""
    properties = b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return greeting(b"NULL") + command(b"\x05READY" + properties)
