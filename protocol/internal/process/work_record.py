"""What a gateway works on, in memory that outlives it, so that its parent can tell whose message it died of.

The parent makes an anonymous file (memfd) and passes its descriptor on; both map it. The gateway writes before it works
on a message and when it is done. A write is a copy of some bytes: no system call, and no message that could be lost.

Layout: a byte that is 1 while a message is worked on; one that is 1 when clients can connect; owner and name of the
message; who else is accused. A text is its length in one byte and up to `_TEXT_BYTES` bytes of UTF-8.
"""

import hashlib
import mmap
import os
from dataclasses import dataclass

SIZE = 4096
_TEXT_BYTES = 95
_NAME_BYTES = 16
_OWNER, _NAME, _ACCUSED = 64, 192, 256
_SAMPLE_BYTES = 512


@dataclass(frozen=True, slots=True)
class Work:
    """A message that is worked on."""

    owner: str
    """Who has sent it: ``key:FINGERPRINT``, ``pid:N``, an address, or empty if that is not known."""
    name: bytes
    """See `name_of`."""


class WorkRecord:
    """The mapped record. Make one with descriptor -1 where nobody else reads it."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SIZE)

    def begin(self, work: Work) -> None:
        """Note what is worked on from now on."""
        memory = self._memory
        memory[_OWNER : _OWNER + 1 + _TEXT_BYTES] = _packed(work.owner)
        memory[_NAME : _NAME + _NAME_BYTES] = work.name
        memory[0] = 1

    def end(self) -> None:
        """Note that the work is done."""
        self._memory[0] = 0

    def note_bound(self) -> None:
        """Note that clients can connect from now on."""
        self._memory[1] = 1

    def is_bound(self) -> bool:
        """Return True if clients could connect."""
        return bool(self._memory[1])

    def accuse(self, owner: str) -> None:
        """Note who is to blame if the process ends while it works on nothing; "" for nobody."""
        self._memory[_ACCUSED : _ACCUSED + 1 + _TEXT_BYTES] = _packed(owner)

    def work(self) -> Work | None:
        """Return what is worked on."""
        if not self._memory[0]:
            return None
        return Work(self._text(_OWNER), bytes(self._memory[_NAME : _NAME + _NAME_BYTES]))

    def accused(self) -> str:
        """Return who is to blame otherwise; "" for nobody."""
        return self._text(_ACCUSED)

    def clear(self) -> None:
        """Begin anew, for another process."""
        self._memory[:] = bytes(SIZE)

    def close(self) -> None:
        self._memory.close()

    def _text(self, at: int) -> str:
        size = min(self._memory[at], _TEXT_BYTES)
        return self._memory[at + 1 : at + 1 + size].decode(errors="replace")


def make_record_file() -> int:
    """Return the descriptor of a new record. OSError."""
    fd = os.memfd_create("mgpu-gateway-work")
    os.ftruncate(fd, SIZE)
    return fd


def name_of(owner: str, body: bytes) -> bytes:
    """Return a name that a message keeps when its client sends it again: a hash of its owner, length, and both ends."""
    sample = (owner.encode(), b"%d" % len(body), body[:_SAMPLE_BYTES], body[-_SAMPLE_BYTES:])
    return hashlib.blake2b(b"\0".join(sample), digest_size=_NAME_BYTES).digest()


def _packed(text: str) -> bytes:
    data = text.encode()[:_TEXT_BYTES]
    return (bytes([len(data)]) + data).ljust(1 + _TEXT_BYTES, b"\0")
