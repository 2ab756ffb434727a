"""The options of the sockets by which hosts reach the orchestrator over tcp: keys, and an early end of dead links."""

from typing import Any

import zmq

from mgpu.protocol.internal.host_messages import CONNECT_MS, HEARTBEAT_MS, RECONNECT_MS
from mgpu.protocol.keys import ClientKeys, use_client_keys

_DEAD_MS = 3 * HEARTBEAT_MS
"""After so long without any byte libzmq closes a connection, and connects again."""


def use_link_options(socket: "zmq.Socket[Any]") -> None:
    """Let libzmq notice dead connections by itself, on either side."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _DEAD_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, _DEAD_MS)


def use_host_options(socket: "zmq.Socket[Any]", identity: bytes, keys: ClientKeys) -> None:
    """Prepare the socket of an agent or of its worker; call it before connecting."""
    use_link_options(socket)
    socket.setsockopt(zmq.IPV6, 1)  # also reaches IPv4
    socket.setsockopt(zmq.ROUTING_ID, identity)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS)
    use_client_keys(socket, keys)
