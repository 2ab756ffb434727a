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

An account may have parts, which divide its turns in the same way: a sequence names a path of numbers, such as a process
and one of its connections. Nobody gains tokens by having more parts. The last part of a path is never part of another.

Accounts that run as much as they may beside others are held: their sequences keep their order and are not next.
A token counts for more if it is costly to choose (`Sequence.token_cost`).

Pure and deterministic; O(log n) per operation, amortized.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from mgpu.orchestrator.scheduler.sequence import Sequence

FIRST_GUESS = 128.0
"""Expected tokens of an answer before the first one has ended."""
_SMOOTHING = 0.05
"""Weight of the latest answer in the mean."""
_SLACK = 64
"""Stale entries that are always allowed, so that cleaning up stays rare."""
_MAX_IDLE = 4096
"""Most parts that are kept with nothing in line. Beyond that they are forgotten, and so are their debts."""


@dataclass(slots=True, eq=False)
class Account:
    """An account or a part of one: what is in line there, and its virtual time among its siblings."""

    number: int = 0
    tag: float = 0.0
    weight: float = 1.0
    num_waiting: int = 0
    """Sequences in line, here and in all parts, without those that have ended."""
    waiting: list[tuple[tuple[int, int], Sequence]] = field(default_factory=list)
    """Heap by (priority, arrival), in last parts. A sequence that ended stays until it comes to the front."""
    entry: int = -1
    """Number of its valid entry in the line of its parent; -1 when it has none."""
    counted: float = 0.0
    """Its part of the weight in line: its weight when it entered."""

    parts: "dict[int, Account]" = field(default_factory=dict)
    line: "list[tuple[float, int, Account]]" = field(default_factory=list)
    """Heap of parts by (tag, entry number). An entry is stale when it is not its part's latest."""
    entries: int = 0
    now: float = 0.0
    """The present in the virtual time of the parts."""
    weight_in_line: float = 0.0
    sweep_at: int = _SLACK

    def part(self, number: int) -> "Account":
        found = self.parts.get(number)
        if found is None:
            found = self.parts[number] = Account(number, self.now)
            if len(self.parts) > self.sweep_at:
                self._forget_idle()
                self.parts[number] = found
        return found

    def head(self) -> "Account | None":
        """Return the part whose turn it is, at the front of the line."""
        while self.line:
            _, entry, part = self.line[0]
            if part.entry == entry:
                if part.num_waiting:
                    return part
                self.step_out(part)
            heapq.heappop(self.line)
        return None

    def enter(self, part: "Account") -> None:
        """Enter a part with its tag; an earlier entry is stale then."""
        if part.entry < 0:
            part.counted = part.weight
            self.weight_in_line += part.counted
        self.entries += 1
        part.entry = self.entries
        heapq.heappush(self.line, (part.tag, part.entry, part))
        if len(self.line) > 2 * len(self.parts) + _SLACK:
            self.line = [each for each in self.line if each[2].entry == each[1]]
            heapq.heapify(self.line)

    def step_out(self, part: "Account") -> None:
        part.entry = -1
        self.weight_in_line = max(0.0, self.weight_in_line - part.counted)

    def charge_head(self, charge: float) -> None:
        """Charge the part at the front of the line, one of whose sequences was taken."""
        part = heapq.heappop(self.line)[2]
        self.now = max(self.now, part.tag) + charge / max(self.weight_in_line, part.weight)
        self.step_out(part)
        part.tag += charge / part.weight
        if part.num_waiting:
            self.enter(part)

    def correct(self, part: "Account", excess: float) -> None:
        """Charge a part for what its sequence has cost beyond its first charge."""
        part.tag += excess / part.weight
        if part.entry >= 0:
            self.enter(part)
        if self.weight_in_line:
            self.now += excess / max(self.weight_in_line, part.weight)

    def _forget_idle(self) -> None:
        """Forget parts that have nothing in line and no debt."""
        busy = {number: each for number, each in self.parts.items() if each.num_waiting or each.entry >= 0}
        in_debt = {number: each for number, each in self.parts.items() if each.tag > self.now}
        kept = busy | in_debt if len(busy | in_debt) <= self.num_waiting + _MAX_IDLE else busy
        self.parts = kept
        self.sweep_at = 2 * len(kept) + _SLACK


class FairQueue:
    """Sequences that have never run. `head` is next; `pop` takes it and charges its account."""

    def __init__(self) -> None:
        self._all = Account()
        self._charges: dict[int, tuple[list[Account], float]] = {}
        """For every sequence that runs, by sequence id: the accounts that were charged, and the tokens."""
        self._num_ended = 0
        self._mean_answer = FIRST_GUESS
        self._held: set[int] = set()

    def __len__(self) -> int:
        return self._all.num_waiting

    def push(self, seq: Sequence) -> None:
        """Add a sequence to those of its account."""
        line = [self._all]
        for number, weight in zip(seq.account, seq.weights, strict=True):
            line.append(line[-1].part(number))
            line[-1].weight = weight
        heapq.heappush(line[-1].waiting, (seq.order, seq))
        for account in line:
            account.num_waiting += 1
        for parent, part in pairwise(line):
            if part.num_waiting == 1 and part.entry < 0:
                part.tag = max(part.tag, parent.now)
            if part.entry < 0 and not (parent is self._all and part.number in self._held):
                parent.enter(part)

    def hold(self, numbers: set[int]) -> None:
        """Hold these accounts from now on, and no others."""
        if numbers == self._held:
            return
        changed, self._held = numbers ^ self._held, numbers
        for account in filter(None, map(self._all.parts.get, changed)):
            if account.number in numbers and account.entry >= 0:
                self._all.step_out(account)
            elif account.number not in numbers and account.entry < 0 and account.num_waiting:
                self._all.enter(account)

    def num_of(self, number: int) -> int:
        """Return how many sequences of an account are in line."""
        found = self._all.parts.get(number)
        return 0 if found is None else found.num_waiting

    def in_line(self) -> set[int]:
        """Return the accounts with sequences in line that are not held."""
        return {part.number for _, entry, part in self._all.line if part.entry == entry and part.num_waiting}

    def head(self) -> Sequence | None:
        """Return the sequence whose turn it is, without taking it."""
        account = self._head_line()[-1]
        while account.waiting and account.waiting[0][1].finished:
            heapq.heappop(account.waiting)
            self._num_ended -= 1
        return account.waiting[0][1] if account.waiting else None

    def _head_line(self) -> list[Account]:
        """Return the accounts whose turn it is, from all to the last part."""
        line = [self._all]
        while (part := line[-1].head()) is not None:
            line.append(part)
        return line

    def pop(self) -> Sequence:
        """Take the head, and charge its account for the rest of the prompt and the expected answer."""
        seq = self.head()
        assert seq is not None, "no sequence waits"
        line = self._head_line()
        heapq.heappop(line[-1].waiting)
        answer = min(self._mean_answer, seq.max_len - seq.prompt_len)
        charge = seq.prompt_len - seq.cached_tokens + answer * seq.token_cost
        self._charges[seq.sequence_id] = line, charge
        for account in line:
            account.num_waiting -= 1
        for parent in line[:-1]:
            parent.charge_head(charge)
        self._reset_if_empty()
        return seq

    def drop(self, seq: Sequence) -> None:
        """Note that a sequence ended in line, before it ran."""
        self._num_ended += 1
        account = self._all
        account.num_waiting -= 1
        for number in seq.account:
            account = account.parts[number]
            account.num_waiting -= 1
        self._reset_if_empty()
        if self._num_ended > len(self) + _SLACK:  # do not keep their prompts in memory
            _drop_ended([self._all])
            self._num_ended = 0

    def settle(self, seq: Sequence) -> None:
        """Correct what `pop` has charged, now that the sequence has ended."""
        answer = len(seq.tokens) - seq.prompt_len
        self._mean_answer += (answer - self._mean_answer) * _SMOOTHING
        line, charge = self._charges.pop(seq.sequence_id, ([], 0.0))
        excess = seq.prompt_len - seq.cached_tokens + answer * seq.token_cost - charge
        for parent, part in pairwise(line):
            if parent.parts.get(part.number) is not part:  # forgotten, and its debt with it
                return
            parent.correct(part, excess)

    def _reset_if_empty(self) -> None:
        if not len(self):  # no account was kept waiting, so none owes anything
            self._all, self._charges, self._num_ended = Account(), {}, 0


def _drop_ended(accounts: Iterable[Account]) -> None:
    for account in accounts:
        account.waiting = [each for each in account.waiting if not each[1].finished]
        heapq.heapify(account.waiting)
        _drop_ended(account.parts.values())
