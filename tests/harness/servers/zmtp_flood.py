"""A peer that sends one message without an end, byte by byte as ZMTP 3 has it: no library would."""

import contextlib
import socket
from collections.abc import Iterator

DEADLINE_S = 60.0
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY = b"\x05READY" + b"\x0bSocket-Type" + b"\0\0\0\x06DEALER"
_IDENTITY = b"\x08Identity"
_LONG_COMMAND, _LONG_AND_MORE = b"\x06", b"\x03"
MiB = 1 << 20


@contextlib.contextmanager
def raw_connection(endpoint: str, routing_id: bytes = b"") -> Iterator[socket.socket]:
    """Connect to an ipc endpoint and complete the handshake. OSError when nobody answers."""
    ready = _READY + (_IDENTITY + len(routing_id).to_bytes(4, "big") + routing_id if routing_id else b"")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(DEADLINE_S)
        peer.connect(endpoint.removeprefix("ipc://"))
        peer.sendall(GREETING + _LONG_COMMAND + len(ready).to_bytes(8, "big") + ready)
        hear(peer, b"READY")
        yield peer


def hear(peer: socket.socket, word: bytes) -> None:
    """Read until ``word`` comes. ConnectionResetError when the connection ends first."""
    heard = b""
    while word not in heard:
        data = peer.recv(4096)
        if not data:
            raise ConnectionResetError("the server has closed the connection")
        heard += data


def flood(endpoint: str, num_frames: int = 300) -> None:
    """Send frames of 1 MiB that all promise another one, then hold the connection until the server ends it."""
    frame = _LONG_AND_MORE + MiB.to_bytes(8, "big") + bytes(MiB)
    with raw_connection(endpoint) as peer, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(num_frames):
            peer.sendall(frame)
        while peer.recv(4096):
            pass
