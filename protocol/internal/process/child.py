"""What every child process does first: read its spec from standard input, and end when its parent ends."""

import ctypes
import os
from collections.abc import Callable
from typing import TypeVar

from mgpu.protocol.internal.codec import Codec, CodecError

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_STDIN = 0
_MAX_SPEC_BYTES = 16 << 20
WAKE_UP = bytes(4)
"""Tells a process in waiting that its spec comes soon: the frame of an empty spec, which no spec is."""


class BadSpec(ValueError):
    """The spec of a child process is unreadable, or contradicts its environment."""


def end_with_parent(number: int) -> None:
    """Ask the kernel for signal ``number`` when the thread that started this process ends. OSError if it refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def frame_spec(data: bytes) -> bytes:
    """Return an encoded spec as `read_spec` expects it: 4 bytes of little-endian length, then the message."""
    return len(data).to_bytes(4, "little") + data


def read_spec(codec: Codec, kind: type[T], on_wake_up: Callable[[], object] | None = None) -> T:
    """Read a spec of class ``kind`` from standard input, as `frame_spec` wrote it. BadSpec for anything else.

    ``on_wake_up`` is called once if `WAKE_UP` comes before the spec.
    """
    length = int.from_bytes(header := _read_exactly(4), "little")
    if header == WAKE_UP and on_wake_up is not None:
        on_wake_up()
        length = int.from_bytes(_read_exactly(4), "little")
    if length > _MAX_SPEC_BYTES:
        raise BadSpec(f"standard input announces a spec of {length} bytes; the limit is {_MAX_SPEC_BYTES}")
    name = kind.__name__.removesuffix("Spec").lower()
    try:
        message = codec.decode(_read_exactly(length))
    except CodecError as error:
        raise BadSpec(f"not a {name} spec: {error}") from error
    if not isinstance(message, kind):
        raise BadSpec(f"expected a {name} spec, got {type(message).__name__}")
    return message


def _read_exactly(count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = os.read(_STDIN, count - len(data))
        if not chunk:
            raise BadSpec(
                f"standard input ended after {len(data)} of {count} bytes; mgpu-launch serve starts this command "
                "and sends it its spec"
            )
        data += chunk
    return bytes(data)
