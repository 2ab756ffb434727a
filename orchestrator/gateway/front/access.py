"""Decide who may connect, and as whom: the handler that libzmq asks for every handshake (ZAP, RFC 27).

`account.py` has the words that say who: connection, identity, owner, account.

Without a ZAP domain libzmq also accepts ZMTP/1.0 greetings, so that sixteen raw bytes on a TCP port would arrive as
a message; with one they are rejected. On ipc the kernel tells the peer's uid, which must be ours or root's. On tcp the
peer must prove (CURVE) that it has a key of the allow-list; without one, only the loopback is let in.
"""

import logging
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import zmq

from mgpu.orchestrator.gateway.front.account import HTTP_PREFIX, KEY_PREFIX, NAMED_PREFIX
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.front.strikes import ShutOut
from mgpu.orchestrator.gateway.front.transport.descriptors import PROCESS
from mgpu.protocol.front.client_messages import ClientMessage, Generate, ResumeRequest
from mgpu.protocol.internal.process.bounded_log import BoundedLog
from mgpu.protocol.keys import KEY_BYTES, fingerprint

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"mgpu"
_IPC_ADDRESS = "localhost:"

log = logging.getLogger(__name__)


class AccessControl:
    """Answers libzmq's ZAP requests in the gateway's own loop; owns the ZAP socket."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        client_keys: Collection[bytes] | None = None,
        own_key: bytes = b"",
    ) -> None:
        """``client_keys`` are the public keys that may connect by tcp; None: there are no keys.

        ``own_key`` is that of the server's own HTTP process, which is on the list always; empty: it needs none.
        """
        self._own_keys = {own_key} if own_key else set()
        self.set_client_keys(client_keys)
        self.shut_out = ShutOut()
        self._admitted: list[tuple[str, str]] = []
        self._refusals = BoundedLog(log, logging.WARNING)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)

    def set_client_keys(self, client_keys: Collection[bytes] | None) -> None:
        """Replace the list of public keys; `check` refuses connected peers whose key is no longer on it."""
        self._client_keys = None if client_keys is None else frozenset(client_keys) | self._own_keys
        self._identities = frozenset(map(_identity_of_key, self._client_keys or ()))

    def answer_requests(self) -> None:
        """Answer every ZAP request that is waiting."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            split = frames.index(b"") + 1
            route, question = frames[:split], frames[split:]
            identity = identify(question, self._client_keys)
            status = self._decide(question, identity)
            request_id = question[1] if len(question) > 1 else b""
            self.socket.send_multipart([*route, b"1.0", request_id, *status, (identity or "").encode(), b""])

    def _decide(self, question: list[bytes], identity: str | None) -> list[bytes]:
        """Return the status of a ZAP reply. After 300 clients with libzmq try again by themselves, after 400 not."""
        if identity is None:
            self._refusals.write("refused a connection from %s", _describe(question))
            return [b"400", b"refused"]
        origin = origin_of(question[3].decode("latin-1"))
        owner = owner_of(identity, origin)
        if self.shut_out.has(owner):
            self._refusals.write("%s is shut out for a while", owner)
            return [b"300", b"shut out for a while"]
        self._admitted.append((origin, owner))
        return [b"200", b"OK"]

    def take_admitted(self) -> list[tuple[str, str]]:
        """Return origin and owner of the connections that were let in since the last call."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def check(self, identity: str) -> None:
        """Raise Refusal if the key of a connected peer has been taken off the list."""
        if self._client_keys is not None and identity.startswith(KEY_PREFIX) and identity not in self._identities:
            raise Refusal("not_allowed", "this client's key is no longer on the server's list")

    def client_of(self, account: str, identity: str, owner: str = "") -> str:
        """Return whose request a message is if it names an ``account``; else nothing.

        The server's own HTTP process is believed: it has checked who its clients are. A peer without a key may make as
        many connections, and so accounts, as it likes, all within its own share: it may name clients too. A client's
        key may not, since it would escape its limits. Refusal.
        """
        if not account:
            return ""
        has_key = identity.startswith(KEY_PREFIX)
        if identity in map(_identity_of_key, self._own_keys) or (not has_key and _is_of_our_parent(owner)):
            return HTTP_PREFIX + account
        if has_key:
            raise Refusal("bad_request", "account is for connections without a key: a key is an account of its own")
        return NAMED_PREFIX + account

    def close(self) -> None:
        self.socket.close()


def origin_of(address: str) -> str:
    """Return who a peer is before it has proven anything: ``pid:N``, or an address, from libzmq's name of it."""
    return PROCESS + address.rpartition(":")[2] if address.startswith(_IPC_ADDRESS) else address


def owner_of(identity: str, origin: str) -> str:
    """Return who is held responsible for a connection."""
    return identity if identity.startswith(KEY_PREFIX) else origin


def _is_of_our_parent(owner: str) -> bool:
    """Return whether a process was started by the server that started this one: of those, its HTTP process connects."""
    if not owner.startswith(PROCESS):
        return False
    try:
        stat = Path("/proc", owner.removeprefix(PROCESS), "stat").read_text(encoding="latin-1")
    except OSError:  # it has ended
        return False
    return int(stat.rpartition(") ")[2].split()[1]) == os.getppid()


def scope_to_key(message: ClientMessage, identity: str) -> ClientMessage:
    """Prefix the session and the cache salt of a message with the key of its client, if it has one.

    So nobody can resume a request of another key, or learn from the time of a first token which prompts others send.
    """
    if not identity.startswith(KEY_PREFIX):
        return message
    if isinstance(message, Generate):
        session = message.session and f"{identity} {message.session}"
        return replace(message, session=session, cache_salt=f"{identity} {message.cache_salt}")
    if isinstance(message, ResumeRequest):
        return replace(message, session=f"{identity} {message.session}")
    return message


def identify(question: list[bytes], client_keys: Collection[bytes] | None) -> str | None:
    """Return the identity of the peer that a ZAP request is about; None if it may not use the front channel."""
    if len(question) < 6 or question[0] != b"1.0" or question[2] != DOMAIN:
        return None
    address, mechanism = question[3].decode("latin-1"), question[5]
    if address.startswith(_IPC_ADDRESS):  # localhost:uid:gid:pid from the kernel
        uid = address.split(":")[1]
        allowed = mechanism == b"NULL" and uid.isdigit() and int(uid) in (0, os.getuid())
        return f"uid:{int(uid)}" if allowed else None
    if client_keys is not None:
        key = question[6] if mechanism == b"CURVE" and len(question) == 7 else b""
        return _identity_of_key(key) if key in client_keys else None
    loopback = address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")
    return "" if mechanism == b"NULL" and loopback else None


def _identity_of_key(key: bytes) -> str:
    return KEY_PREFIX + fingerprint(key)


def _describe(question: list[bytes]) -> str:
    """Name the peer that was refused, in characters that cannot forge a line of the log."""
    address = ascii(question[3].decode("latin-1"))[1:-1][:64] if len(question) > 3 else "nowhere"
    if len(question) == 7 and question[5] == b"CURVE" and len(question[6]) == KEY_BYTES:
        return f"{address}: key {fingerprint(question[6])} is not on the list"
    return address
