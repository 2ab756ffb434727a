"""Sequences that decode in lockstep: each step of a batch computes one token of every member.

The columns of the step plan are kept between steps. A member is looked at only in the step in which it is due: when it
needs another block, or when all of its tokens are planned. So the work of a step grows with what changes.

Example: blocks of 16 tokens; a member joins with 20 tokens in 2 blocks and may have 100. It is due in 12 steps, when
position 32 needs a third block, and every 16 steps after that, until position 98 is computed, which samples its last.
"""

from mgpu.orchestrator.scheduler.sequence import Sequence


class DecodeBatch:
    """Members and their plan columns. A pipeline of S stages has S batches that take turns."""

    def __init__(self, index: int, block_size: int) -> None:
        self.members: list[Sequence] = []
        self.rows: list[int] = []
        self.starts: list[int] = []
        """Position that the next step computes, parallel to ``members``; the step samples the token after it."""
        self._index = index
        self._block_size = block_size
        self._tick = 0
        self._due: dict[int, list[Sequence]] = {}
        """By tick. An entry is stale when its member has left or is due at another tick."""

    def add(self, seq: Sequence, start: int) -> None:
        """Let a sequence decode here; its token at ``start`` is known to the workers and not computed yet."""
        seq.batch, seq.slot = self._index, len(self.members)
        self.members.append(seq)
        self.rows.append(seq.row)
        self.starts.append(start)
        self.remind(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a member out and note how far it got. The last member moves to its slot."""
        slot = seq.slot
        seq.num_computed = self.starts[slot]
        seq.batch = seq.slot = seq.due_tick = -1
        last, row, start = self.members.pop(), self.rows.pop(), self.starts.pop()
        if last is not seq:
            self.members[slot], self.rows[slot], self.starts[slot] = last, row, start
            last.slot = slot

    def holds(self, seq: Sequence) -> bool:
        return seq.batch == self._index

    def due(self) -> list[Sequence]:
        """Return the members to look at before this step, oldest first, and forget their reminders."""
        tick = self._tick
        due = [seq for seq in self._due.pop(tick, ()) if seq.batch == self._index and seq.due_tick == tick]
        for seq in due:
            seq.due_tick = -1
        return sorted(due, key=lambda seq: seq.turn) if len(due) > 1 else due

    def remind(self, seq: Sequence) -> None:
        """Set when a member must be looked at again."""
        start = self.starts[seq.slot]
        until_block = len(seq.blocks) * self._block_size - start
        until_last = seq.max_len - 2 - start
        seq.due_tick = self._tick + min(until_block, until_last)
        self._due.setdefault(seq.due_tick, []).append(seq)

    def needs_block(self, seq: Sequence) -> bool:
        return self.starts[seq.slot] == len(seq.blocks) * self._block_size

    def is_planned_to_the_end(self, seq: Sequence) -> bool:
        return self.starts[seq.slot] + 1 >= seq.max_len

    def advance(self) -> None:
        """Move every member one position on: the step that computes ``starts`` is planned."""
        self.starts = [start + 1 for start in self.starts]
        self._tick += 1
