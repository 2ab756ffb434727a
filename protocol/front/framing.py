"""Framing, limits and socket options of the front channel.

A message is two frames, ``b"mgpu1"`` and one MessagePack map. The version frame is compared before anything is
decoded. The limits below bound what a hostile peer can make the other side do.

To a client that has sent `batch`, the server sends an array of maps where several are due at the same time. A frame
costs both ends as much time as the map in it, and wakes a thread of libzmq at each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgpack
import zmq

VERSION = b"mgpu1"
MAX_FRAMES = 4
"""A message with more frames is refused, and its rest is dropped undecoded."""


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """Bounds of one message."""

    frame_bytes: int
    array_items: int
    map_items: int
    containers: int
    """Arrays and maps together. Without this bound, a megabyte of tiny arrays takes a third of a second to decode."""


FROM_CLIENT = MessageLimits(frame_bytes=1 << 20, array_items=1 << 16, map_items=1 << 10, containers=1 << 13)
FROM_SERVER = MessageLimits(frame_bytes=16 << 20, array_items=1 << 16, map_items=1 << 12, containers=1 << 18)
"""Larger, for log-probabilities of 20 candidates of hundreds of tokens."""

UNREAD_MESSAGES = 16
"""Per connection to the server; each may have the size of the largest frame. With more, the peer has to wait."""
HEARTBEAT_INTERVAL_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 15_000
HANDSHAKE_TIMEOUT_MS = 3_000


class WireError(ValueError):
    """Frames that are not a message of this protocol. ``code`` is the failure code for the peer."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def pack(values: Mapping[str, object]) -> list[bytes]:
    """Return the frames of one message. ValueError for values outside MessagePack: lone surrogates, huge integers."""
    try:
        return [VERSION, cast("bytes", msgpack.packb(values, use_bin_type=True))]
    except (OverflowError, UnicodeEncodeError, TypeError) as error:
        raise ValueError(f"cannot be sent: {error}") from None


def batch_of(bodies: Sequence[bytes]) -> bytes:
    """Return the second frame for maps that are packed already: the map itself, or an array of several."""
    count = len(bodies)
    if count == 1:
        return bodies[0]
    head = bytes([0x90 | count]) if count < 16 else b"\xdc" + count.to_bytes(2, "big")  # as MessagePack has it
    return head + b"".join(bodies)


def unpack(frames: list[bytes], limits: MessageLimits = FROM_CLIENT) -> dict[object, object]:
    """Decode one message within the limits. WireError for any other bytes."""
    data = _unpack_any(frames, limits)
    if not isinstance(data, dict):
        raise WireError("bad_request", f"a message is a MessagePack map, got {type(data).__name__}")
    return data


def unpack_batch(frames: list[bytes], limits: MessageLimits = FROM_SERVER) -> list[dict[object, object]]:
    """Decode a message, or several that came as an array, within the limits. WireError for any other bytes."""
    data = _unpack_any(frames, limits)
    batch: list[Any] = data if isinstance(data, list) else [data]
    for each in batch:
        if type(each) is not dict:
            raise WireError("bad_request", f"a message is a MessagePack map, got {type(each).__name__}")
    return batch


def _unpack_any(frames: list[bytes], limits: MessageLimits) -> object:
    if not frames or frames[0] != VERSION:
        raise WireError("bad_version", f"the first frame must be {VERSION.decode()!r}, got {_head(frames)}")
    if len(frames) != 2:
        raise WireError("bad_request", f"a message is 2 frames, version and map, got {_count(frames)}")
    if len(frames[1]) > limits.frame_bytes:
        raise WireError("bad_request", f"the message has {len(frames[1])} bytes, the limit is {limits.frame_bytes}")
    return _decode(frames[1], limits)


def _decode(body: bytes, limits: MessageLimits) -> object:
    if len(body) <= limits.containers:  # each takes a byte at least: nothing has to be counted
        return _unpackb(body, limits)
    containers = 0

    def count(value: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > limits.containers:
            raise ValueError(f"more than {limits.containers} arrays and maps")
        return value

    return _unpackb(body, limits, count)


def _unpackb(body: bytes, limits: MessageLimits, hook: Callable[[Any], Any] | None = None) -> object:
    try:
        return msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            list_hook=hook,
            object_hook=hook,
            max_array_len=limits.array_items,
            max_map_len=limits.map_items,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises half a dozen unrelated classes for hostile bytes
        detail = str(error)[:120] or type(error).__name__
        raise WireError(
            "bad_request", f"the second frame is not one MessagePack map within the limits: {detail}"
        ) from None


def _head(frames: list[bytes]) -> str:
    return ascii(frames[0][:16].decode("latin-1")) if frames else "no frame"


def _count(frames: list[bytes]) -> str:
    return f"{len(frames)}" if len(frames) <= MAX_FRAMES else f"more than {MAX_FRAMES}"


def set_common_options(socket: "zmq.Socket[Any]") -> None:
    """Set the options of both ends: a short handshake, a bounded wait on close."""
    socket.setsockopt(zmq.LINGER, 500)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)


def set_server_options(socket: "zmq.Socket[Any]", max_bytes: int) -> None:
    """Prepare the gateway's ROUTER: a send to a vanished peer fails, and a routing id cannot be taken over.

    Not ZMQ_HEARTBEAT_IVL: libzmq (4.3.5, stream_engine_base.cpp) aborts the process when a heartbeat is due on a
    connection that is closed and whose messages were not all read, because the ROUTER has enough of them. So any client
    could end the gateway by sending much and leaving. The kernel notices dead machines instead, and heartbeats of
    clients are answered.
    """
    set_common_options(socket)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, HEARTBEAT_INTERVAL_MS // 1000)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, HEARTBEAT_INTERVAL_MS // 1000)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, HEARTBEAT_TIMEOUT_MS // HEARTBEAT_INTERVAL_MS - 1)
    socket.setsockopt(zmq.TCP_MAXRT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.RCVHWM, UNREAD_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)


def set_client_options(socket: "zmq.Socket[Any]", endpoint: str) -> None:
    """Prepare a client's DEALER.

    Not ZMQ_IMMEDIATE: with it, libzmq drops unread messages when the server closes the connection, such as the one that
    says why. Without it, libzmq keeps a message that finds no connection for the next one. So the client begins
    requests, asks queries and resumes only while its monitor says that it is connected. `cancel`, and what it sends in
    reply to a message, go out without this check: the next connection may deliver them.

    Messages wait without a bound of libzmq: a client keeps each request until it ends, so it bounds what waits itself.
    With a bound, a burst of more would fail as if the server were away, and a cancel in it would be lost.
    """
    set_common_options(socket)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 10_000)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
