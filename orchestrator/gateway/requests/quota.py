"""Count what every client has in flight, refuse what is too much, and say when to come back.

Bounds hold for the engine's queues too: a sequence counts from its submission until the engine has said its last word
about it, and its bytes until the engine has said its first, so that asking and cancelling in a loop is bounded as well.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn

from mgpu.orchestrator.gateway.front.access import KEY_PREFIX
from mgpu.orchestrator.gateway.requests.admission import Refusal
from mgpu.protocol.internal.client_limits import ClientLimits

REQUEST_OVERHEAD_BYTES = 1024
"""What a request weighs however short it is."""
MAX_DROPPED = 1024
"""Sequences of one client that were cancelled and that the engine has not let go yet."""
MIN_RETRY_S, FIRST_RETRY_S, MAX_RETRY_S = 0.25, 1.0, 30.0
_RATE_WINDOW_S = 10.0
_SHARE_TO_END = 1 / 8
"""Who is refused should come back when this part of what is in flight has ended."""


def owner_of(identity: str, connection: bytes) -> str:
    """Say whose limits and share a request counts to.

    A key is one client with all its connections. Without keys all connections are of one user, or cannot be told
    apart; then each is a client of its own, so that the programs of that user are fair to each other.
    """
    return identity if identity.startswith(KEY_PREFIX) else f"{identity} {connection.hex()}"


def client_number(owner: str) -> int:
    """Give the number by which the scheduler knows a client, the same in every gateway."""
    return int.from_bytes(blake2b(owner.encode(), digest_size=7).digest(), "little")


def size_of(body_bytes: int, n: int) -> int:
    """Give what a request weighs while it waits: each of its choices holds the prompt."""
    return n * (body_bytes + REQUEST_OVERHEAD_BYTES)


class EndingRate:
    """How many sequences end per second, over about the last ten seconds."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._last_s = -math.inf

    def note(self, now_s: float) -> None:
        self._rate = self.at(now_s) + 1 / _RATE_WINDOW_S
        self._last_s = now_s

    def at(self, now_s: float) -> float:
        return self._rate * math.exp((self._last_s - now_s) / _RATE_WINDOW_S)


@dataclass(slots=True)
class _Usage:
    """Of one client."""

    requests: int = 0
    queued_bytes: int = 0
    sequences: int = 0
    """Submitted and not ended."""
    dropped: int = 0
    """Of these, cancelled."""
    unsubmitted: int = 0
    """Of requests whose prompt is being tokenized."""

    @property
    def is_empty(self) -> bool:
        return not (self.requests or self.queued_bytes or self.sequences)


@dataclass(slots=True)
class _Open:
    """A sequence that the engine has not ended."""

    owner: str
    queued_bytes: int
    dropped: bool = False


class Quota:
    """The books of one gateway. ``limits`` may be replaced at any time; what is in flight stays."""

    def __init__(self, limits: ClientLimits, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock_s = clock_s
        self._usage: dict[str, _Usage] = {}
        self._open: dict[int, _Open] = {}
        self._queued_bytes = 0
        self._unsubmitted = 0
        """Sequences of requests whose prompt is being tokenized."""
        self._rate = EndingRate()

    @property
    def num_sequences(self) -> int:
        return len(self._open) + self._unsubmitted

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def check(self, owner: str, size: int, n: int) -> None:
        """Refusal when ``n`` more sequences of ``size`` bytes are too much for their client or for the server.

        Whatever its size, a request is taken when nothing else waits.
        """
        limits, usage = self.limits, self._usage.get(owner) or _Usage()
        if usage.requests >= limits.client_requests:
            self._refuse(f"this client has {usage.requests} requests in flight, the limit is {limits.client_requests}")
        if usage.dropped >= MAX_DROPPED:
            self._refuse(f"this client has cancelled {usage.dropped} sequences that have not ended yet")
        held = usage.sequences + usage.unsubmitted
        if held and held + n > limits.client_sequences:
            self._refuse(f"this client has {held} sequences in flight, the limit is {limits.client_sequences}")
        if self.num_sequences + n > limits.sequences:
            self._refuse(f"the server has {self.num_sequences} sequences in flight, the limit is {limits.sequences}")
        self._check_bytes("this client", usage.queued_bytes, size, limits.client_queue_bytes)
        self._check_bytes("the server", self._queued_bytes, size, limits.queue_bytes)

    def _check_bytes(self, who: str, queued: int, size: int, limit: int) -> None:
        if queued and queued + size > limit:
            self._refuse(f"{who} has {queued} bytes of requests waiting, {size} more exceed the limit of {limit}")

    def _refuse(self, text: str) -> NoReturn:
        raise Refusal("overloaded", text, self.retry_after_s())

    def retry_after_s(self) -> float:
        """Estimate when an eighth of what is in flight will have ended, within bounds."""
        rate = self._rate.at(self._clock_s())
        if not rate:
            return FIRST_RETRY_S
        wait_s = max(1.0, self.num_sequences * _SHARE_TO_END) / rate
        return round(min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S), 2)

    def arrive(self, owner: str, size: int, n: int) -> None:
        """Count a request that waits to be tokenized or submitted."""
        usage = self._usage.setdefault(owner, _Usage())
        usage.requests += 1
        usage.unsubmitted += n
        self._unsubmitted += n
        self._queue(usage, size)

    def submit(self, owner: str, sequence_ids: list[int], size: int) -> None:
        """Note that an arrived request has become these sequences, or has taken them over from another connection."""
        usage = self._usage[owner]
        self._unsubmitted -= len(sequence_ids)
        usage.unsubmitted -= len(sequence_ids)
        usage.sequences += len(sequence_ids)
        for at, number in enumerate(sequence_ids):
            self._close(number)
            part = size // len(sequence_ids) + (size % len(sequence_ids) if at == 0 else 0)
            self._open[number] = _Open(owner, part)

    def withdraw(self, owner: str, size: int, n: int) -> None:
        """Give back what `arrive` has counted for a request that is not submitted."""
        usage = self._usage[owner]
        self._unsubmitted -= n
        usage.unsubmitted -= n
        self._queue(usage, -size)
        self._tidy(owner, usage)

    def leave(self, owner: str, sequence_ids: list[int]) -> None:
        """Note that a request is over for its client; what it has submitted ends when the engine says so."""
        usage = self._usage[owner]
        usage.requests -= 1
        for number in sequence_ids:
            if (sequence := self._open.get(number)) is not None and not sequence.dropped:
                sequence.dropped = True
                usage.dropped += 1
        self._tidy(owner, usage)

    def begun(self, sequence_id: int) -> None:
        """Note the engine's first word about a sequence: it waits no more."""
        sequence = self._open.get(sequence_id)
        if sequence is not None and sequence.queued_bytes:
            self._queue(self._usage[sequence.owner], -sequence.queued_bytes)
            sequence.queued_bytes = 0

    def ended(self, sequence_id: int) -> None:
        """Note the engine's last word about a sequence."""
        if self._close(sequence_id):
            self._rate.note(self._clock_s())

    def _close(self, sequence_id: int) -> bool:
        self.begun(sequence_id)
        sequence = self._open.pop(sequence_id, None)
        if sequence is None:
            return False
        usage = self._usage[sequence.owner]
        usage.sequences -= 1
        usage.dropped -= sequence.dropped
        self._tidy(sequence.owner, usage)
        return True

    def _queue(self, usage: _Usage, size: int) -> None:
        usage.queued_bytes += size
        self._queued_bytes += size

    def _tidy(self, owner: str, usage: _Usage) -> None:
        if usage.is_empty:
            del self._usage[owner]
