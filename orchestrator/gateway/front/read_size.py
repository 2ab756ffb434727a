"""Let libzmq read one frame of a connection after the other, so that no peer can make it abort by a PING.

libzmq (4.3.5, stream_engine_base.cpp) reads up to 8 KiB of a connection at once and decodes them frame by frame. When
the ROUTER has as many messages of a connection as it may have, the engine stops in the middle of what it has read. If
the peer closes its connection now, the engine notes an error and goes on only when the ROUTER has been read: with the
rest of these bytes. If a PING is among them, it is answered at once, and the engine asserts that there was no error.
So a peer that sends messages and PINGs in turn and then leaves would end the process, with keys (CURVE) as without.

An engine that reads no more than `READ_BYTES` at once has nothing left when it stops, or a single byte, and a PING has
at least seven. Bodies of frames are not cut: libzmq reads whatever is longer than its buffer straight into the
message. So a short frame costs two reads and a long one three, some microseconds in a thread of libzmq's own.

The size is an option of libzmq (ZMQ_IN_BATCH_SIZE) that builds without draft options do not let a program set, and
those of pyzmq are such builds. It lies in the socket itself, between others of known values, and all connections
inherit it. Where it is not found there, nothing is changed: the gateway is replaced when it aborts, uncounted.
"""

import ctypes
import logging
import struct
from typing import Any

import zmq

READ_BYTES = 2
"""The flags and the length of a short frame. Less than a PING needs in any case."""
_VERSION = (4, 3)
_SOCKET_BYTES = 1536
"""Of a ROUTER, which has over 2000, so many are searched."""
_SIZES = struct.Struct("=ii?")
_USUAL = _SIZES.pack(8192, 8192, True)
"""``in_batch_size``, ``out_batch_size`` and ``zero_copy`` of options.hpp. Messages that lie in the buffer itself, as
with ``zero_copy``, need a buffer that holds nine bytes."""
_SMALL = _SIZES.pack(READ_BYTES, 8192, False)

log = logging.getLogger(__name__)


def read_frame_by_frame(router: "zmq.Socket[Any]") -> bool:
    """Make the connections of a ROUTER that is not bound yet read so; return whether that was possible."""
    address = int(router.underlying)
    held = ctypes.string_at(address, _SOCKET_BYTES) if zmq.zmq_version_info()[:2] == _VERSION else b""
    if held.count(_USUAL) != 1:
        log.warning("this libzmq (%s) reads ahead: a client's PING can have the gateway replaced", zmq.zmq_version())
        return False
    ctypes.memmove(address + held.index(_USUAL), _SMALL, _SIZES.size)
    return True
