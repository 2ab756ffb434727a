"""Count what every account and every owner has in flight, refuse what is too much, and say when to come back.

Bounds hold for the engine's queues too: a sequence counts until the engine's last output of it, and its bytes until
the first, so that sending and cancelling requests in a loop is bounded as well.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn

from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.protocol.internal.client_limits import FREE_TIMES, ClientLimits

REQUEST_OVERHEAD_BYTES = 1024
"""What a request counts for however short it is."""
MAX_DROPPED = 1024
"""Sequences of one account that were cancelled and that the engine has not ended yet."""
MAX_QUESTIONS, MAX_QUESTIONS_OF_ACCOUNT = 8192, 1024
"""Questions that wait for the engine at the same time, of all and of one account; more if the limits allow as many
sequences or requests, because each may be resumed."""
MIN_RETRY_S, FIRST_RETRY_S, MAX_RETRY_S = 0.25, 1.0, 30.0
_RATE_WINDOW_S = 10.0
_OWNER = "the key, process or address of this client"
_SHARE_TO_END = 1 / 8
"""A refused client should come back when this part of what is in flight has ended."""


def account_number(name: str) -> int:
    """Return the number by which the scheduler knows a part of an account's path, the same in every gateway."""
    return int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "little")


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
    """What an account has in flight, or what a change adds to it."""

    requests: int = 0
    queued_bytes: int = 0
    unsubmitted: int = 0
    """Sequences of requests whose prompt is being tokenized."""
    sequences: int = 0
    """Submitted and not ended."""
    dropped: int = 0
    """Of these, cancelled."""
    questions: int = 0
    """To the engine, without an answer yet."""

    def add(self, change: "_Usage") -> None:
        self.requests += change.requests
        self.queued_bytes += change.queued_bytes
        self.unsubmitted += change.unsubmitted
        self.sequences += change.sequences
        self.dropped += change.dropped
        self.questions += change.questions


@dataclass(slots=True)
class _OpenSequence:
    """A sequence that the engine has not ended."""

    account: Account
    queued_bytes: int
    dropped: bool = False


class Quota:
    """Counts what is in flight. ``limits`` may be replaced at any time; what is in flight stays."""

    def __init__(self, limits: ClientLimits, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock_s = clock_s
        self._usage: dict[Account, _Usage] = {}
        self._of_owner: dict[str, _Usage] = {}
        self._open: dict[int, _OpenSequence] = {}
        self._all = _Usage()
        self._rate = EndingRate()

    @property
    def num_sequences(self) -> int:
        return self._all.sequences + self._all.unsubmitted

    @property
    def num_clients(self) -> int:
        """Accounts with requests in flight."""
        return sum(1 for usage in self._usage.values() if usage.requests > 0)

    @property
    def queued_bytes(self) -> int:
        return self._all.queued_bytes

    @property
    def num_questions(self) -> int:
        return self._all.questions

    def usage_of(self, account: Account) -> _Usage:
        return self._usage.get(account) or _Usage()

    def usage_of_owner(self, owner: str) -> _Usage:
        return self._of_owner.get(owner) or _Usage()

    # ---------------------------------------------------------------- checks

    def check(self, account: Account, size: int, n: int) -> None:
        """Raise Refusal if ``n`` more sequences of ``size`` bytes are too much for account, owner or server.

        Whatever its size, a request is taken when nothing else waits.
        """
        limits, usage = self.limits, self.usage_of(account)
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
        self._check_owner(account.owner, size, n)

    def _check_owner(self, owner: str, size: int, n: int) -> None:
        """Raise Refusal if the accounts of an owner have so much that too little is left for others."""
        usage = self.usage_of_owner(owner)
        held, most = usage.sequences + usage.unsubmitted, self.limits.most_sequences_of_owner(self.num_sequences)
        if held and held + n > most:
            self._refuse(f"{_OWNER} has {held} sequences in flight, the limit is {most} now")
        most = self.limits.most_bytes_of_owner(self.queued_bytes)
        self._check_bytes(_OWNER, usage.queued_bytes, size, most)

    def _check_bytes(self, who: str, queued: int, size: int, limit: int) -> None:
        if queued and queued + size > limit:
            self._refuse(f"{who} has {queued} bytes of requests waiting, {size} more exceed the limit of {limit}")

    def _refuse(self, text: str) -> NoReturn:
        raise Refusal("overloaded", text, self.retry_after_s())

    def check_question(self, account: Account) -> None:
        """Raise Refusal if too many questions wait for the engine."""
        asked, asked_by_all = self.usage_of(account).questions, self.num_questions
        most = max(MAX_QUESTIONS_OF_ACCOUNT, self.limits.max_client_requests)
        most_of_all = max(MAX_QUESTIONS, self.limits.max_sequences)
        asked_by_owner = self.usage_of_owner(account.owner).questions
        most_of_owner = max(most, FREE_TIMES * (most_of_all - asked_by_all))
        if asked >= most or asked_by_owner >= most_of_owner or asked_by_all >= most_of_all:
            text = (
                f"{asked} questions of this client, {asked_by_owner} of its key, process or address and "
                f"{asked_by_all} of all wait for the engine, the limits are {most}, {most_of_owner} and {most_of_all}"
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

    def _count(self, account: Account, change: _Usage) -> None:
        """Change what an account has in flight, its owner, and all. An account or owner with nothing is forgotten."""
        usage = self._usage.setdefault(account, _Usage())
        of_owner = self._of_owner.setdefault(account.owner, _Usage())
        for each in (usage, of_owner, self._all):
            each.add(change)
        if usage == _Usage():
            del self._usage[account]
        if of_owner == _Usage():
            del self._of_owner[account.owner]

    def count_question(self, account: Account, number: int = 1) -> None:
        """Count a question that waits for the engine; ``number`` -1: it waits no more."""
        self._count(account, _Usage(questions=number))

    def arrive(self, account: Account, size: int, n: int) -> None:
        """Count a request whose prompt waits to be tokenized or submitted."""
        self._count(account, _Usage(requests=1, queued_bytes=size, unsubmitted=n))

    def withdraw(self, account: Account, size: int, n: int) -> None:
        """Undo the sequences and bytes that `arrive` has counted for a request that is not submitted."""
        self._count(account, _Usage(queued_bytes=-size, unsubmitted=-n))

    def submit(self, account: Account, sequence_ids: list[int], size: int) -> None:
        """Record that a request that arrived has these sequences, new ones or those of an earlier connection."""
        n = len(sequence_ids)
        self._count(account, _Usage(sequences=n, unsubmitted=-n))
        for at, number in enumerate(sequence_ids):
            self._close(number)
            self._open[number] = _OpenSequence(account, size // n + (size % n if at == 0 else 0))

    def leave(self, account: Account, sequence_ids: list[int]) -> None:
        """Record that a request is over for its client; its sequences count until the engine has ended them."""
        dropped = [each for number in sequence_ids if (each := self._open.get(number)) and not each.dropped]
        for sequence in dropped:
            sequence.dropped = True
        self._count(account, _Usage(requests=-1, dropped=len(dropped)))

    def begun(self, sequence_id: int) -> None:
        """Record the engine's first output of a sequence: it waits no more."""
        sequence = self._open.get(sequence_id)
        if sequence is not None and sequence.queued_bytes:
            self._count(sequence.account, _Usage(queued_bytes=-sequence.queued_bytes))
            sequence.queued_bytes = 0

    def ended(self, sequence_id: int) -> None:
        """Record the engine's last output of a sequence."""
        if self._close(sequence_id):
            self._rate.note(self._clock_s())

    def _close(self, sequence_id: int) -> bool:
        self.begun(sequence_id)
        sequence = self._open.pop(sequence_id, None)
        if sequence is not None:
            self._count(sequence.account, _Usage(sequences=-1, dropped=-sequence.dropped))
        return sequence is not None
