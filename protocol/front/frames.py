"""Send and receive the frames of a message with as few calls as pyzmq allows.

pyzmq's `send_multipart` and `recv_multipart` pass each frame through several Python functions: 4.6 and 2.7 µs of a core
for a message of two frames. The methods that it has compiled take 0.8 and 1.3 µs.
"""

from typing import Any

import zmq
from zmq.backend import Socket

_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_send, _recv = Socket.send, Socket.recv


def send_message(socket: "zmq.Socket[Any]", version: bytes, body: bytes) -> None:
    """Send a message of a DEALER without waiting. zmq.Again if the pipe is full."""
    _send(socket, version, _MORE)
    _send(socket, body, _LAST)


def send_message_to(socket: "zmq.Socket[Any]", connection: bytes, version: bytes, body: bytes) -> None:
    """Send a message of a ROUTER without waiting. zmq.Again if the pipe is full; ZMQError if the peer is gone."""
    _send(socket, connection, _MORE)
    _send(socket, version, _MORE)
    _send(socket, body, _LAST)


def receive_frames(socket: "zmq.Socket[Any]") -> list[bytes]:
    """Return the frames of the next message. zmq.Again if there is none."""
    frame = _recv(socket, _LAST, copy=False)
    frames = [frame.bytes]
    while frame.more:
        frame = _recv(socket, _LAST, copy=False)
        frames.append(frame.bytes)
    return frames
