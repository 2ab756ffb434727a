"""Whose turn it is: weighted fair queueing of waiting sequences over accounts, in tokens.

Every account has a tag, its virtual time: the tokens that it was served, divided by its weight. The account with the
smallest tag is next, and of its sequences the one with the smallest (priority, arrival). An account that joins the line
starts at the present time at least. The present advances as if all accounts in line were served at once, each by its
weight. So an account saves up no turns while it is away, pays nothing for having been alone, and is not kept waiting by
an endless row of newcomers. While sequences wait, accounts get tokens in proportion to their weights, however many
sequences each of them has. (Weighted fair queueing, Demers, Keshav and Shenker 1989, with start tags. The length of an
answer is unknown, so a guess is charged first and corrected at its end.)

Example: A (weight 1) and B (weight 2) join at time 0, and each sequence costs 100 tokens. A is served once, to tag 100;
B is served twice, to tags 50 and 100. If C joins now, it starts at the present, 300 tokens / weight 3 = 100, not at 0.

Pure and deterministic; O(log n) per operation, amortized.
"""

import heapq
from dataclasses import dataclass, field

from mgpu.orchestrator.scheduler.sequence import Sequence

FIRST_GUESS = 128.0
"""Expected tokens of an answer before the first one has ended."""
_SMOOTHING = 0.05
"""Weight of the latest answer in the mean."""
_SLACK = 64
"""Stale entries that are always allowed, so that cleaning up stays rare."""
_MAX_IDLE = 4096
"""Most accounts that are kept with nothing in line. Beyond that they are forgotten, and so are their debts."""


@dataclass(slots=True, eq=False)
class Account:
    """Its sequences in line, and its virtual time."""

    tag: float
    weight: float = 1.0
    waiting: list[tuple[tuple[int, int], Sequence]] = field(default_factory=list)
    """Heap by (priority, arrival). A sequence that ended stays until it comes to the front."""
    entry: int = -1
    """Number of its valid entry in the line of accounts; -1 when it has none."""
    counted: float = 0.0
    """Its part of the weight in line: its weight when it entered."""


class FairQueue:
    """Sequences that have never run. `head` is next; `pop` takes it and charges its account."""

    def __init__(self) -> None:
        self._accounts: dict[int, Account] = {}
        self._line: list[tuple[float, int, Account]] = []
        """Heap by (tag, entry number). An entry is stale when it is not its account's latest."""
        self._charges: dict[int, tuple[Account, float]] = {}
        """For every sequence that runs, by sequence id: the account that was charged, and the tokens."""
        self._entries = 0
        self._now = 0.0
        self._weight_in_line = 0.0
        self._num_waiting = 0
        self._num_ended = 0
        self._sweep_at = _SLACK
        self._mean_answer = FIRST_GUESS

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, seq: Sequence) -> None:
        """Add a sequence to those of its account."""
        account = self._accounts.get(seq.account)
        if account is None:
            account = self._accounts[seq.account] = Account(self._now)
        account.weight = seq.weight
        heapq.heappush(account.waiting, (seq.order, seq))
        self._num_waiting += 1
        if account.entry < 0:
            account.tag = max(account.tag, self._now)
            self._enter(account)
        if len(self._accounts) > self._sweep_at:
            self._forget_idle()

    def head(self) -> Sequence | None:
        """Return the sequence whose turn it is, without taking it."""
        while self._line:
            _, entry, account = self._line[0]
            if account.entry == entry:
                while account.waiting and account.waiting[0][1].finished:
                    heapq.heappop(account.waiting)
                    self._num_ended -= 1
                if account.waiting:
                    return account.waiting[0][1]
                self._step_out(account)
            heapq.heappop(self._line)
        return None

    def pop(self) -> Sequence:
        """Take the head, and charge its account for the rest of the prompt and the expected answer."""
        seq = self.head()
        assert seq is not None, "no sequence waits"
        account = heapq.heappop(self._line)[2]
        heapq.heappop(account.waiting)
        charge = seq.prompt_len - seq.cached_tokens + min(self._mean_answer, seq.max_len - seq.prompt_len)
        self._charges[seq.sequence_id] = account, charge
        self._now = max(self._now, account.tag) + charge / max(self._weight_in_line, account.weight)
        self._step_out(account)
        account.tag += charge / account.weight
        if account.waiting:
            self._enter(account)
        self._leave()
        return seq

    def drop(self, seq: Sequence) -> None:
        """Note that a sequence ended in line, before it ran."""
        self._num_ended += 1
        self._leave()
        if self._num_ended > self._num_waiting + _SLACK:  # do not keep their prompts in memory
            self._drop_ended()

    def settle(self, seq: Sequence) -> None:
        """Correct what `pop` has charged, now that the sequence has ended."""
        answer = len(seq.tokens) - seq.prompt_len
        self._mean_answer += (answer - self._mean_answer) * _SMOOTHING
        account, charge = self._charges.pop(seq.sequence_id, (None, 0.0))
        if account is None or self._accounts.get(seq.account) is not account:  # forgotten, and its debt with it
            return
        excess = len(seq.tokens) - seq.cached_tokens - charge
        account.tag += excess / account.weight
        if account.entry >= 0:
            self._enter(account)
        if self._weight_in_line:
            self._now += excess / max(self._weight_in_line, account.weight)

    def _enter(self, account: Account) -> None:
        if account.entry < 0:
            account.counted = account.weight
            self._weight_in_line += account.counted
        self._entries += 1
        account.entry = self._entries
        heapq.heappush(self._line, (account.tag, account.entry, account))
        if len(self._line) > 2 * len(self._accounts) + _SLACK:
            self._line = [each for each in self._line if each[2].entry == each[1]]
            heapq.heapify(self._line)

    def _step_out(self, account: Account) -> None:
        account.entry = -1
        self._weight_in_line = max(0.0, self._weight_in_line - account.counted)

    def _leave(self) -> None:
        self._num_waiting -= 1
        if not self._num_waiting:  # no account was kept waiting, so none owes anything
            self._accounts, self._line, self._charges = {}, [], {}
            self._num_ended, self._now, self._weight_in_line, self._sweep_at = 0, 0.0, 0.0, _SLACK

    def _drop_ended(self) -> None:
        for account in self._accounts.values():
            account.waiting = [each for each in account.waiting if not each[1].finished]
            heapq.heapify(account.waiting)
        self._num_ended = 0

    def _forget_idle(self) -> None:
        """Forget accounts that have nothing in line and no debt."""
        kept = {number: each for number, each in self._accounts.items() if each.entry >= 0 or each.tag > self._now}
        if len(kept) > self._num_waiting + _MAX_IDLE:
            kept = {number: each for number, each in kept.items() if each.entry >= 0}
        self._accounts = kept
        self._sweep_at = 2 * len(kept) + _SLACK
