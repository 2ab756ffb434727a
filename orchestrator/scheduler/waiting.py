"""The sequences that wait for a row: first those that have run before, in their old order, then new ones in fair order.

Of those that have run, crash suspects come first: each runs alone, so the others then start only once. A new sequence
of an owner that runs much less than another comes before all but these (`RunningShares.lacks`).
"""

import heapq
from collections.abc import Callable, Iterable

from mgpu.orchestrator.scheduler.crash_suspects import is_suspect
from mgpu.orchestrator.scheduler.fair_queue import FairQueue
from mgpu.orchestrator.scheduler.sequence import Sequence


class WaitingLine:
    """All live sequences that are not on the workers. A sequence that ended (see `end`) never comes to the front."""

    def __init__(self) -> None:
        self._new = FairQueue()
        self._returning: list[tuple[bool, int, Sequence]] = []
        """Heap by turn. A sequence that has begun goes first: its computed blocks may still be in the pool."""
        self._turns = 0
        self.lacks: Callable[[int], bool] = lambda _owner: False
        """Whether an owner's new sequences come before those that have run."""

    def hold(self, owners: set[int]) -> None:
        """Let no new sequences of these owners come to the front until the next call; see running_shares.py."""
        self._new.hold(owners)

    def new_owners(self) -> set[int]:
        """Return the owners of sequences that wait for their first row and are not held."""
        return self._new.in_line()

    def num_new_of(self, owner: int) -> int:
        """Return how many sequences of an owner wait for their first row."""
        return self._new.num_of(owner)

    def join(self, seq: Sequence) -> None:
        """Line up, for the first time or after being preempted."""
        if seq.turn < 0:
            self._new.push(seq)
        else:
            heapq.heappush(self._returning, _place_of(seq))

    def bring_back(self, live: Iterable[Sequence]) -> None:
        """Line up every sequence that has ever run, because the workers are gone."""
        self._returning = [_place_of(seq) for seq in live if seq.turn >= 0]
        heapq.heapify(self._returning)

    def first(self) -> Sequence | None:
        """Return the sequence that runs next, without taking it."""
        while self._returning and self._returning[0][-1].finished:
            heapq.heappop(self._returning)
        new = self._new.head()
        if not self._returning or (new is not None and self._overtakes(new)):
            return new
        return self._returning[0][-1]

    def _overtakes(self, new: Sequence) -> bool:
        return not is_suspect(self._returning[0][-1]) and self.lacks(new.account[0])

    def take_first(self) -> Sequence:
        """Take the sequence that runs next. A new one gets its turn, and its account is charged."""
        seq = self.first()
        assert seq is not None, "no sequence waits"
        if seq.turn >= 0:
            return heapq.heappop(self._returning)[-1]
        seq = self._new.pop()
        seq.turn, self._turns = self._turns, self._turns + 1
        return seq

    def end(self, seq: Sequence) -> None:
        """Note that a sequence has ended, in line or on the workers."""
        if seq.turn < 0:
            self._new.drop(seq)
        else:
            self._new.settle(seq)


def _place_of(seq: Sequence) -> tuple[bool, int, Sequence]:
    return not is_suspect(seq), seq.turn, seq
