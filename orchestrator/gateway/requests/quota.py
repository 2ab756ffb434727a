"""Count what every account has in flight, refuse what is too much, and say when to come back.

Bounds hold for the engine's queues too: a sequence counts until the engine's last output of it, and its bytes until
the first, so that sending and cancelling requests in a loop is bounded as well.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn

from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.protocol.internal.client_limits import ClientLimits

REQUEST_OVERHEAD_BYTES = 1024
"""What a request counts for however short it is."""
MAX_DROPPED = 1024
"""Sequences of one account that were cancelled and that the engine has not ended yet."""
MAX_QUESTIONS, MAX_QUESTIONS_OF_ACCOUNT = 8192, 1024
"""Questions that wait for the engine at the same time, of all and of one account; more if the limits allow as many
sequences or requests, because each may be resumed."""
MIN_RETRY_S, FIRST_RETRY_S, MAX_RETRY_S = 0.25, 1.0, 30.0
_RATE_WINDOW_S = 10.0
_SHARE_TO_END = 1 / 8
"""A refused client should come back when this part of what is in flight has ended."""


def account_number(account: str) -> int:
    """Return the number by which the scheduler knows an account, the same in every gateway."""
    return int.from_bytes(blake2b(account.encode(), digest_size=7).digest(), "little")


def size_of(body_bytes: int, n: int) -> int:
    """Return the bytes that a request counts for while it waits: each of its choices holds the prompt."""
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
    """What one account has in flight."""

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
class _OpenSequence:
    """A sequence that the engine has not ended."""

    account: str
    queued_bytes: int
    dropped: bool = False


class Quota:
    """Counts what is in flight. ``limits`` may be replaced at any time; what is in flight stays."""

    def __init__(self, limits: ClientLimits, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock_s = clock_s
        self._usage: dict[str, _Usage] = {}
        self._open: dict[int, _OpenSequence] = {}
        self.queued_bytes = 0
        self._unsubmitted = 0
        """Sequences of requests whose prompt is being tokenized."""
        self._questions: Counter[str] = Counter()
        self.num_questions = 0
        self._rate = EndingRate()

    @property
    def num_sequences(self) -> int:
        return len(self._open) + self._unsubmitted

    # ---------------------------------------------------------------- checks

    def check(self, account: str, size: int, n: int) -> None:
        """Raise Refusal if ``n`` more sequences of ``size`` bytes are too much for their account or the server.

        Whatever its size, a request is taken when nothing else waits.
        """
        limits, usage = self.limits, self._usage.get(account) or _Usage()
        if usage.requests >= limits.max_client_requests:
            self._refuse(
                f"this client has {usage.requests} requests in flight, the limit is {limits.max_client_requests}"
            )
        if usage.dropped >= MAX_DROPPED:
            self._refuse(f"this client has cancelled {usage.dropped} sequences that have not ended yet")
        held = usage.sequences + usage.unsubmitted
        if held and held + n > limits.max_client_sequences:
            self._refuse(f"this client has {held} sequences in flight, the limit is {limits.max_client_sequences}")
        if self.num_sequences + n > limits.max_sequences:
            self._refuse(
                f"the server has {self.num_sequences} sequences in flight, the limit is {limits.max_sequences}"
            )
        self._check_bytes("this client", usage.queued_bytes, size, limits.max_client_queue)
        self._check_bytes("the server", self.queued_bytes, size, limits.max_queue)

    def _check_bytes(self, who: str, queued: int, size: int, limit: int) -> None:
        if queued and queued + size > limit:
            self._refuse(f"{who} has {queued} bytes of requests waiting, {size} more exceed the limit of {limit}")

    def _refuse(self, text: str) -> NoReturn:
        raise Refusal("overloaded", text, self.retry_after_s())

    def check_question(self, account: str) -> None:
        """Raise Refusal if too many questions wait for the engine."""
        asked, asked_by_all = self._questions[account], self.num_questions
        most = max(MAX_QUESTIONS_OF_ACCOUNT, self.limits.max_client_requests)
        most_of_all = max(MAX_QUESTIONS, self.limits.max_sequences)
        if asked >= most or asked_by_all >= most_of_all:
            text = (
                f"{asked} questions of this client and {asked_by_all} of all wait for the engine, "
                f"the limits are {most} and {most_of_all}"
            )
            raise Refusal("overloaded", text, RETRY_AFTER_S)

    def retry_after_s(self) -> float:
        """Estimate when an eighth of what is in flight will have ended, within bounds."""
        rate = self._rate.at(self._clock_s())
        if not rate:
            return FIRST_RETRY_S
        wait_s = max(1.0, self.num_sequences * _SHARE_TO_END) / rate
        return round(min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S), 2)

    # ---------------------------------------------------------------- counts

    def has_questions(self, account: str) -> bool:
        return account in self._questions

    def count_question(self, account: str, number: int = 1) -> None:
        """Count a question that waits for the engine; ``number`` -1: it waits no more."""
        self.num_questions += number
        self._questions[account] += number
        if not self._questions[account]:
            del self._questions[account]

    def arrive(self, account: str, size: int, n: int) -> None:
        """Count a request whose prompt waits to be tokenized or submitted."""
        usage = self._usage.setdefault(account, _Usage())
        usage.requests += 1
        usage.unsubmitted += n
        self._unsubmitted += n
        self._queue(usage, size)

    def submit(self, account: str, sequence_ids: list[int], size: int) -> None:
        """Record that a request that arrived has these sequences, new ones or those of an earlier connection."""
        usage = self._usage[account]
        self._unsubmitted -= len(sequence_ids)
        usage.unsubmitted -= len(sequence_ids)
        usage.sequences += len(sequence_ids)
        for at, number in enumerate(sequence_ids):
            self._close(number)
            part = size // len(sequence_ids) + (size % len(sequence_ids) if at == 0 else 0)
            self._open[number] = _OpenSequence(account, part)

    def withdraw(self, account: str, size: int, n: int) -> None:
        """Undo the sequences and bytes that `arrive` has counted for a request that is not submitted."""
        usage = self._usage[account]
        self._unsubmitted -= n
        usage.unsubmitted -= n
        self._queue(usage, -size)
        self._forget_if_empty(account, usage)

    def leave(self, account: str, sequence_ids: list[int]) -> None:
        """Record that a request is over for its client; its sequences count until the engine has ended them."""
        usage = self._usage[account]
        usage.requests -= 1
        for number in sequence_ids:
            if (sequence := self._open.get(number)) is not None and not sequence.dropped:
                sequence.dropped = True
                usage.dropped += 1
        self._forget_if_empty(account, usage)

    def begun(self, sequence_id: int) -> None:
        """Record the engine's first output of a sequence: it waits no more."""
        sequence = self._open.get(sequence_id)
        if sequence is not None and sequence.queued_bytes:
            self._queue(self._usage[sequence.account], -sequence.queued_bytes)
            sequence.queued_bytes = 0

    def ended(self, sequence_id: int) -> None:
        """Record the engine's last output of a sequence."""
        if self._close(sequence_id):
            self._rate.note(self._clock_s())

    def _close(self, sequence_id: int) -> bool:
        self.begun(sequence_id)
        sequence = self._open.pop(sequence_id, None)
        if sequence is None:
            return False
        usage = self._usage[sequence.account]
        usage.sequences -= 1
        usage.dropped -= sequence.dropped
        self._forget_if_empty(sequence.account, usage)
        return True

    def _queue(self, usage: _Usage, size: int) -> None:
        usage.queued_bytes += size
        self.queued_bytes += size

    def _forget_if_empty(self, account: str, usage: _Usage) -> None:
        if usage.is_empty:
            del self._usage[account]
