"""Hand out the rows of the workers' row table, and take a row back when no token can reach it any more.

Plans are published before the results of earlier ones are back, and the workers write a sampled token into its row
themselves: with pipeline stages the token travels from the last stage to the first while later plans are on their way.
So a row must not change its owner while a token for it is under way.

Example: sequence A has row 3 and decodes in steps 7 and 8. Both are published when A is cancelled, and the result of
step 7 has arrived. Step 9 tells the workers to free row 3, but no new sequence gets it in step 9: the token of step 8
would land in it. Row 3 is free when the result of step 8 has arrived.

A preempted sequence waits just as long, because only then are all of its tokens known from which it starts again.
"""

from collections import deque
from collections.abc import Iterable

from mgpu.orchestrator.scheduler.sequence import Sequence


class RowPool:
    """Rows ``[0, num_rows)``: free, held by a sequence, or leaving (given back, and a token may be under way)."""

    def __init__(self, num_rows: int) -> None:
        self.to_free: list[int] = []
        """Rows that the next plan tells the workers to free."""
        self._num_rows = num_rows
        self._free = list(range(num_rows - 1, -1, -1))
        self._leaving: deque[tuple[int, int, Sequence]] = deque()
        """(step, row, sequence): the row is free when the result of ``step`` has arrived."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_to_come(self) -> int:
        """Rows that are free now or will be when the steps in flight are over."""
        return len(self._free) + len(self._leaving)

    def take(self, seq: Sequence) -> None:
        """Assign a free row to a sequence."""
        seq.row = self._free.pop()

    def give_back(self, seq: Sequence, last_step: int) -> None:
        """Take the row of a sequence that is in no step after ``last_step``."""
        self.to_free.append(seq.row)
        self._leaving.append((last_step, seq.row, seq))
        seq.row = -1

    def release_until(self, step: int) -> list[Sequence]:
        """Free the rows that no token can reach after the result of ``step``, and return their sequences."""
        left = []
        while self._leaving and self._leaving[0][0] <= step:
            _, row, seq = self._leaving.popleft()
            self._free.append(row)
            left.append(seq)
        return left

    def check_integrity(self, held: Iterable[int]) -> None:
        """Prove that every row is free, leaving or held. AssertionError if not."""
        rows = [*self._free, *(row for _, row, _ in self._leaving), *held]
        assert sorted(rows) == list(range(self._num_rows)), "rows do not add up"
