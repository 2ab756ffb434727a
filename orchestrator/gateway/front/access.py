"""Decide who may connect, and as whom: the handler that libzmq asks for every handshake (ZAP, RFC 27).

Without a ZAP domain libzmq also accepts ZMTP/1.0 greetings, so that sixteen raw bytes on a TCP port would arrive as
a message; with one they are rejected. On ipc the kernel tells the peer's uid, which must be ours or root's. On tcp the
peer must prove (CURVE) that it has a key of the allow-list; without one, only the loopback is let in.
"""

import logging
import os
import time
from collections.abc import Collection

import zmq

from mgpu.protocol.keys import KEY_BYTES, fingerprint

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"mgpu"
KEY_PREFIX = "key:"
LOG_INTERVAL_S = 1.0
"""Refusals are logged at most this often; whoever knocks without end must not fill the disk."""

log = logging.getLogger(__name__)


class Doorkeeper:
    """Answers libzmq's questions in the gateway's own loop; owns the ZAP socket."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", client_keys: Collection[bytes] | None = None) -> None:
        """``client_keys`` are the public keys that may connect by tcp; None: there are no keys."""
        self.let_in(client_keys)
        self._logged_s = -LOG_INTERVAL_S
        self._unlogged = 0
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)

    def let_in(self, client_keys: Collection[bytes] | None) -> None:
        """Take another list of public keys; see `allows` for peers that are connected already."""
        self._client_keys = None if client_keys is None else frozenset(client_keys)
        self._identities = frozenset(map(identity_of_key, client_keys or ()))

    def answer(self) -> None:
        """Answer every question that is waiting."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            split = frames.index(b"") + 1
            route, question = frames[:split], frames[split:]
            identity = identify(question, self._client_keys)
            if identity is None:
                self._log_refusal(question)
            status = [b"400", b"refused"] if identity is None else [b"200", b"OK"]
            request_id = question[1] if len(question) > 1 else b""
            self.socket.send_multipart([*route, b"1.0", request_id, *status, (identity or "").encode(), b""])

    def allows(self, identity: str) -> bool:
        """Tell whether a peer that was let in as ``identity`` still would be: its key may have been taken away."""
        return self._client_keys is None or not identity.startswith(KEY_PREFIX) or identity in self._identities

    def close(self) -> None:
        self.socket.close()

    def _log_refusal(self, question: list[bytes]) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s < LOG_INTERVAL_S:
            self._unlogged += 1
            return
        more = f" ({self._unlogged} more since the last such line)" if self._unlogged else ""
        self._logged_s, self._unlogged = now_s, 0
        log.warning("refused a connection from %s%s", _describe(question), more)


def identity_of_key(key: bytes) -> str:
    """Name the client that has this public key."""
    return KEY_PREFIX + fingerprint(key)


def identify(question: list[bytes], client_keys: Collection[bytes] | None) -> str | None:
    """Say who sends a ZAP request: ``uid:N`` on ipc, ``key:FINGERPRINT`` with keys, ``""`` on tcp without.

    None for a peer that may not use the front channel.
    """
    if len(question) < 6 or question[0] != b"1.0" or question[2] != DOMAIN:
        return None
    address, mechanism = question[3].decode("latin-1"), question[5]
    if address.startswith("localhost:"):  # ipc: localhost:uid:gid:pid from the kernel
        uid = address.split(":")[1]
        allowed = mechanism == b"NULL" and uid.isdigit() and int(uid) in (0, os.getuid())
        return f"uid:{int(uid)}" if allowed else None
    if client_keys is not None:
        key = question[6] if mechanism == b"CURVE" and len(question) == 7 else b""
        return identity_of_key(key) if key in client_keys else None
    loopback = address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")
    return "" if mechanism == b"NULL" and loopback else None


def _describe(question: list[bytes]) -> str:
    """Say who was refused, in characters that cannot forge a line of the log."""
    address = ascii(question[3].decode("latin-1"))[1:-1][:64] if len(question) > 3 else "nowhere"
    if len(question) == 7 and question[5] == b"CURVE" and len(question[6]) == KEY_BYTES:
        return f"{address}: key {fingerprint(question[6])} is not on the list"
    return address
