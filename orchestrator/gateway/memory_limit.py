"""Bound the memory of the gateway process as a whole: libzmq bounds a frame, but not how many frames a message has.

A peer that never sends its last frame makes libzmq keep all the others, out of anyone's sight, until it disconnects.
Nor would another socket help: what libzmq then frees stays with the process (408 MiB of 408, measured). So the process
looks at its own size and leaves when it has grown too much: another one takes its place, and clients resume.
"""

import re
from pathlib import Path

from mgpu.orchestrator.gateway.front.socket import MAX_TOTAL_BACKLOG_BYTES
from mgpu.protocol.internal.client_limits import ClientLimits

OWN_ROOM_BYTES = 512 << 20
"""For running requests, the interpreter's own needs and fragments."""
_SIZES = re.compile(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", re.MULTILINE)
_OOM_SCORE_FILE = Path("/proc/self/oom_score_adj")
_OOM_SCORE_ADJ = 500
"""As if half of the machine's memory were added to this process's own."""


class MemoryFull(Exception):
    """The process must make room for another one."""


class MemoryBound:
    """What the process may grow by since `settle`."""

    def __init__(self, most_bytes: int = 0) -> None:
        """0: as much as the bounds of waiting requests and answers need."""
        self._most_bytes = most_bytes
        self.settle()

    def settle(self) -> None:
        """Take what is held now, such as the tokenizer, for the beginning."""
        self._base_bytes = private_bytes()

    def check(self, limits: ClientLimits) -> None:
        """MemoryFull when the process has grown too much; call it a few times a second."""
        most_bytes = self._most_bytes or room_of(limits)
        grown_bytes = private_bytes() - self._base_bytes
        if grown_bytes > most_bytes:
            raise MemoryFull(
                f"it holds {grown_bytes >> 20} MiB more than at first, the bound is {most_bytes >> 20} MiB: clients "
                "send more than can be read, or messages without an end"
            )


def room_of(limits: ClientLimits) -> int:
    """Give the bytes that the other bounds allow, each twice: as it came or goes, and as what is worked on."""
    return OWN_ROOM_BYTES + 2 * (limits.queue_bytes + MAX_TOTAL_BACKLOG_BYTES)


def private_bytes() -> int:
    """Give the memory that nobody else has: what is resident, and what was swapped out."""
    return sum(map(int, _SIZES.findall(Path("/proc/self/status").read_text()))) << 10


def be_first_to_go() -> None:
    """Let the kernel end this process rather than the parent or a worker when the machine's memory runs out."""
    try:
        if int(_OOM_SCORE_FILE.read_text()) < _OOM_SCORE_ADJ:
            _OOM_SCORE_FILE.write_text(str(_OOM_SCORE_ADJ))
    except OSError:
        return  # a sandbox without /proc to write to: then all are equal
