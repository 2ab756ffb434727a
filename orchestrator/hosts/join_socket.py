"""The orchestrator's socket for hosts that join: encrypted tcp, for keys of the list of workers and nobody else."""

import logging
from collections.abc import Collection, Iterator

import zmq

from mgpu.orchestrator.gateway.front.endpoint import BindError, bind
from mgpu.orchestrator.host.server_keys import WorkerKeys
from mgpu.protocol.internal.host_messages import DOMAIN
from mgpu.protocol.internal.host_socket import use_link_options
from mgpu.protocol.keys import KEY_BYTES, fingerprint, use_server_key

_ZAP = "inproc://zeromq.zap.01"
_LINGER_MS = 2000
_MAX_BYTES = 64 << 20
"""Of a message from a host. A peer that announces more is cut off."""

log = logging.getLogger(__name__)


class JoinSocket:
    """A ROUTER socket and the ZAP handler in front of it. For one thread; `close` it."""

    def __init__(self, endpoint: str, keys: WorkerKeys) -> None:
        """Bind ``endpoint``. BindError if it cannot be."""
        self._allowed: Collection[bytes] = frozenset(keys.workers)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.zap = self._context.socket(zmq.ROUTER)
        self.zap.setsockopt(zmq.LINGER, 0)
        self.zap.bind(_ZAP)
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, _MAX_BYTES)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer whose connection is gone is an error, not silence
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer comes back before its dead connection is noticed
        self.socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        self.socket.set_hwm(0)
        self.socket.setsockopt(zmq.IPV6, "[" in endpoint or "*" in endpoint)
        use_link_options(self.socket)
        use_server_key(self.socket, keys.secret)
        try:
            self.endpoint, _ = bind(self.socket, endpoint, has_keys=True)
        except BaseException as error:
            self.close()
            if isinstance(error, BindError):  # its words are those for --bind
                raise type(error)(str(error).replace("--bind", "--join")) from None
            raise

    @property
    def sockets(self) -> tuple["zmq.Socket[bytes]", ...]:
        """What to poll; `receive` reads all of them."""
        return self.socket, self.zap

    def receive(self) -> Iterator[tuple[bytes, bytes]]:
        """Let peers in, and yield the identity and the data of each message that has come."""
        self._answer_handshakes()
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 2:
                yield frames[0], frames[1]

    def send(self, identity: bytes, data: bytes) -> bool:
        """Send to a peer. Return False if its connection is gone."""
        try:
            self.socket.send_multipart([identity, data], zmq.NOBLOCK)
            return True
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise

    def _answer_handshakes(self) -> None:
        while True:
            try:
                frames = self.zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            split = frames.index(b"") + 1
            route, question = frames[:split], frames[split:]
            allowed = self._is_allowed(question)
            status = [b"200", b"OK"] if allowed else [b"400", b"refused"]
            request_id = question[1] if len(question) > 1 else b""
            self.zap.send_multipart([*route, b"1.0", request_id, *status, b"", b""])

    def _is_allowed(self, question: list[bytes]) -> bool:
        is_curve = len(question) == 7 and question[2] == DOMAIN and question[5] == b"CURVE"
        if is_curve and question[6] in self._allowed:
            return True
        address = ascii(question[3].decode("latin-1"))[1:-1][:64] if len(question) > 3 else "nowhere"
        key = fingerprint(question[6]) if is_curve and len(question[6]) == KEY_BYTES else "none"
        log.warning("refused a host at %s: its key (%s) is not in workers/ of --keys", address, key)
        return False

    def close(self) -> None:
        """Close the socket once its messages have left, after two seconds at most."""
        self._context.destroy(linger=_LINGER_MS)
