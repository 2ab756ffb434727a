"""Keep chosen routing ids away from those that libzmq chooses.

A ROUTER (libzmq 4.3.5, router.cpp) numbers the peers that choose no id: ``b"\\0"`` and a counter of 32 bits. It aborts
the process when another peer has chosen the id that is next, and it does not stop peers from choosing such ids. Three
things keep that from happening:

1. The counter starts at rand(), which nobody seeds: it would start at the same number in every gateway. `seed` makes
   the start unpredictable, and ids never leave the process, so nobody can know what is next.
2. The gateway knows the counter: `AutomaticIds` learns its start, and it cannot have gone on by more than the number of
   completed handshakes. Who sends a message under an id of this kind that was not given yet has chosen it, and is
   disconnected.
3. Who holds such an id and says nothing is found when the counter comes near: `held_ahead` asks for the next ids.

Example: the start is 1000, and 20 handshakes were completed. A message from id 1500 means that its sender has chosen
the id; a message from 1010 does not. Id 1230 exists: somebody holds it in silence, and the 210th connection from now
could meet it.
"""

import ctypes
import os
from typing import Any

import zmq

_ENDPOINT = "inproc://first-routing-id"
_PROBE_MS = 5000
JUST_GIVEN = 128
"""Handshakes that are completed while the next ids are asked for, at most."""
_NUM_IDS = 1 << 32


def seed() -> None:
    """Let the ROUTERs that this process makes from now on number their peers from an unpredictable start."""
    ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4), "little")))


class AutomaticIds:
    """The ids that a ROUTER gives to peers without one."""

    def __init__(self, context: "zmq.Context[Any]", router: "zmq.Socket[Any]") -> None:
        """Learn the start from a first connection, before ``router`` is bound for others."""
        self._router = router
        self._first = _first_id(context, router)
        self.num_given = 1
        """At most so many have been given: one for each completed handshake."""

    def is_chosen(self, connection: bytes) -> bool:
        """Return whether an id looks like one of these but was not given yet, so that its peer has chosen it."""
        if len(connection) != 5 or connection[0]:
            return False
        return (int.from_bytes(connection[1:], "big") - self._first) % _NUM_IDS >= self.num_given

    def held_ahead(self, count: int) -> bool:
        """Return whether a connected peer holds one of the next ``count`` ids.

        The very next ones are left out: a connection may have got its id a moment ago, before it was counted.
        """
        return any(self._is_held(self.num_given + ahead) for ahead in range(JUST_GIVEN, JUST_GIVEN + count))

    def _is_held(self, distance: int) -> bool:
        connection = b"\0" + ((self._first + distance) % _NUM_IDS).to_bytes(4, "big")
        try:
            self._router.send(connection, zmq.SNDMORE | zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return error.errno != zmq.EHOSTUNREACH
        self._router.send(b"", zmq.NOBLOCK)  # a message that was begun has to be ended
        return True


def _first_id(context: "zmq.Context[Any]", router: "zmq.Socket[Any]") -> int:
    router.bind(_ENDPOINT)
    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    try:
        peer.connect(_ENDPOINT)
        peer.send(b"")
        if not router.poll(_PROBE_MS):
            raise RuntimeError(f"the front socket has not read its own message within {_PROBE_MS} ms")
        connection, _ = router.recv_multipart()
    finally:
        peer.close()
        router.unbind(_ENDPOINT)
    return int.from_bytes(connection[1:], "big")
