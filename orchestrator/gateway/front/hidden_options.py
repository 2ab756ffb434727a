"""Set options of libzmq that its builds do not let a program set, so that no peer can make it abort or use it up.

Both weaknesses are those of libzmq 4.3.5.

*PINGs.* An engine (stream_engine_base.cpp) reads up to 8 KiB of a connection at once and decodes them frame by frame.
When the ROUTER has as many messages of a connection as it may have, the engine stops in the middle of what it has read.
If the peer closes its connection now, the engine notes an error and goes on only when the ROUTER has been read: with
the rest of these bytes. If a PING is among them, it is answered at once, and the engine asserts that there was no
error. So a peer that sends messages and PINGs in turn and then leaves would end the process, with keys (CURVE) as
without. An engine that reads no more than `READ_BYTES` at once has at most six bytes left when it stops, since at least
one belongs to the frame that it stops at, and a PING has seven. Bodies of frames are not cut: libzmq reads whatever is
longer than its buffer straight into the message. So a short frame costs one or two reads and a long one three, some
microseconds in a thread of libzmq's own.

*Routing ids.* A ROUTER (router.cpp) ignores a peer that has chosen a routing id in use, but takes in 16 messages of it,
which nobody reads and nothing frees, and if it has sent more when it leaves, keeps its descriptor too. An id may be a
megabyte long, and a copy comes with each message. So connections do not look for an id. Each begins with an empty
message instead, and for the ROUTER that is a peer without an id, whom it gives one.

The options lie in the socket object, and all connections inherit them. `in_batch_size`, `out_batch_size`, `zero_copy`
and `router_notify` lie side by side and have known values. `recv_routing_id` is the one byte that ZMQ_ROUTER_RAW turns
from 1 to 0, which is tried on other sockets. Where that is not found, nothing is changed: the gateway is replaced when
it aborts, uncounted. Peers may choose ids then. libzmq aborts when one has chosen the number that it is about to give
to another, and the numbers start at rand(), which nobody seeds: `seed_routing_ids` keeps anybody from knowing them.
"""

import ctypes
import logging
import os
import re
import struct
from typing import Any

import zmq

READ_BYTES = 7
"""The shortest PING. Three empty frames, or a whole version frame."""
_VERSION = (4, 3)
_SOCKET_BYTES = 1536
"""Of a ROUTER, which has over 2000, so many are searched."""
_USUAL = re.compile(re.escape(struct.pack("=ii?", 8192, 8192, True)) + b".{3}" + re.escape(bytes(4)), re.DOTALL)
"""``in_batch_size``, ``out_batch_size``, ``zero_copy``, three bytes between, ``router_notify``."""
_PROBES = 3
"""Memory that was used before may hold the same bytes at other places by chance, but not in all of these sockets."""
_NOTIFY_CONNECT = 1
"""An empty message before a connection's own."""
_HARDENED = struct.pack("=ii?3xi", READ_BYTES, 8192, False, _NOTIFY_CONNECT)
"""Without ``zero_copy``, which needs room for nine bytes in the buffer."""

log = logging.getLogger(__name__)


def seed_routing_ids() -> None:
    """Let the ROUTERs that this process makes from now on number their peers from an unpredictable start."""
    ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4), "little")))


def set_hidden_options(context: "zmq.Context[Any]", router: "zmq.Socket[Any]") -> bool:
    """Harden the connections that a ROUTER will accept once it is bound; return whether that was possible."""
    probes = [context.socket(zmq.ROUTER) for _ in range(_PROBES)]
    sizes = set.intersection(*map(_places_of_sizes, (router, *probes)))
    takes_ids = set.intersection(*map(_places_of_flag, probes))
    for probe in probes:
        probe.close()
    if len(sizes) != 1 or len(takes_ids) != 1 or zmq.zmq_version_info()[:2] != _VERSION:
        text = "options of libzmq %s are not found (%s, %s): clients can have the gateway replaced"
        log.warning(text, zmq.zmq_version(), sorted(sizes), sorted(takes_ids))
        return False
    address = int(router.underlying)
    ctypes.memmove(address + sizes.pop(), _HARDENED, len(_HARDENED))
    ctypes.memset(address + takes_ids.pop(), 0, 1)
    return True


def _places_of_sizes(router: "zmq.Socket[Any]") -> set[int]:
    return {found.start() for found in _USUAL.finditer(_held(router))}


def _places_of_flag(probe: "zmq.Socket[Any]") -> set[int]:
    """Return where a ROUTER may have ``recv_routing_id``, by what another option changes."""
    before = _held(probe)
    probe.setsockopt(zmq.ROUTER_RAW, 1)
    return {at for at, (old, new) in enumerate(zip(before, _held(probe), strict=True)) if (old, new) == (1, 0)}


def _held(router: "zmq.Socket[Any]") -> bytes:
    return ctypes.string_at(int(router.underlying), _SOCKET_BYTES)
