"""Limit the memory of the gateway process as a whole: libzmq bounds a frame, but not how many frames a message has.

A peer that never sends its last frame makes libzmq keep all the others, unseen, until it disconnects. Another socket
would not help: what libzmq frees then stays with the process (408 MiB of 408, measured). So the process looks at its
own size and exits when it has grown too much; another one takes its place, and clients resume.
"""

import re
import time
from pathlib import Path

from mgpu.orchestrator.gateway.front.inbox import MAX_TOTAL_BYTES
from mgpu.orchestrator.gateway.front.socket import MAX_TOTAL_BACKLOG_BYTES
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.process.free_memory import release_free_memory

BASE_BYTES = 512 << 20
"""For running requests, the interpreter's own needs and fragments."""
WORTH_RELEASING_BYTES = 32 << 20
RELEASE_INTERVAL_S = 5.0
_SIZES = re.compile(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", re.MULTILINE)
_OOM_SCORE_FILE = Path("/proc/self/oom_score_adj")
_OOM_SCORE_ADJ = 500
"""As if half of the machine's memory were added to this process's own."""


class MemoryFull(Exception):
    """The process must exit and be replaced."""


class MemoryLimit:
    """How much the process may grow after `set_baseline`."""

    def __init__(self, max_growth_bytes: int = 0) -> None:
        """0: as much as the bounds of waiting requests and answers need."""
        self._max_growth_bytes = max_growth_bytes
        self._next_release_s = 0.0
        self.set_baseline()

    def set_baseline(self) -> None:
        """Do not count what is held now, such as the tokenizer."""
        self._baseline_bytes = private_bytes()

    def is_tight(self, limits: ClientLimits) -> bool:
        """Return whether a quarter of the bound is used."""
        return self._grown_bytes() > self._bound(limits) // 4

    def release(self, limits: ClientLimits) -> None:
        """Return memory that is free to the system: at once if memory is tight, else every few seconds."""
        now_s = time.monotonic()
        is_due = now_s >= self._next_release_s and self._grown_bytes() > WORTH_RELEASING_BYTES
        if is_due or self.is_tight(limits):
            self._next_release_s = now_s + RELEASE_INTERVAL_S
            release_free_memory()

    def check(self, limits: ClientLimits) -> None:
        """Raise MemoryFull if the process has grown too much; call it a few times a second."""
        max_growth_bytes, grown_bytes = self._bound(limits), self._grown_bytes()
        if grown_bytes > max_growth_bytes:
            raise MemoryFull(
                f"it holds {grown_bytes >> 20} MiB more than at first, the bound is {max_growth_bytes >> 20} MiB: "
                "clients send more than can be read, or messages without an end"
            )

    def _bound(self, limits: ClientLimits) -> int:
        return self._max_growth_bytes or room_for(limits)

    def _grown_bytes(self) -> int:
        return private_bytes() - self._baseline_bytes


def room_for(limits: ClientLimits) -> int:
    """Return the bytes that the other bounds allow, each twice: as received or sent, and as decoded."""
    return BASE_BYTES + 2 * (limits.max_queue + MAX_TOTAL_BACKLOG_BYTES + MAX_TOTAL_BYTES)


def private_bytes() -> int:
    """Return the memory that only this process has, resident or swapped out."""
    return sum(map(int, _SIZES.findall(Path("/proc/self/status").read_text()))) << 10


def prefer_as_oom_victim() -> None:
    """Let the kernel end this process rather than the parent or a worker when the machine's memory runs out."""
    try:
        if int(_OOM_SCORE_FILE.read_text()) < _OOM_SCORE_ADJ:
            _OOM_SCORE_FILE.write_text(str(_OOM_SCORE_ADJ))
    except OSError:
        return  # a sandbox without a writable /proc
