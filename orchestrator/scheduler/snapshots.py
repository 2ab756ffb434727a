"""Which states of linear layers are kept, so that a sequence that begins alike need not compute them again.

A state stands for all tokens before it and cannot be cut as keys and values can. So copies of it are kept, each at the
end of a block, under the key of that block (block_pool.py). They are kept where others will want to go on:

- at the last full block of a prompt, where its next turn, or the same prompt again, goes on;
- where a prompt leaves blocks that others computed: what begins so begins so again;
- every `INTERVAL` blocks of a prompt;
- at the last full block of an answer. While it grows, the newer copy replaces the older one.

Example: blocks of 16 tokens. A prompt of 100 tokens is computed to 96, its state is copied, and its last 4 tokens are
computed in the next step. At tokens 112, 128, … of the answer the state is copied again. The next turn has 180 tokens
and begins with these 128: it starts from the copy at 128.

A copy is made at the beginning of a step, of a row's state before that step. Copies that no sequence has used for the
longest time give their place to new ones. Integers only: the states are on the workers.
"""

from collections import OrderedDict
from collections.abc import Sequence as Ordered

from mgpu.orchestrator.scheduler.sequence import Sequence

INTERVAL = 64
"""Blocks between two copies of a prompt's state: their copying must not be felt, nor the steps that end there."""


class Snapshots:
    """Slots ``[first_slot, first_slot + count)`` of the workers' states, which no row has."""

    def __init__(self, first_slot: int, count: int) -> None:
        self._slots = range(first_slot, first_slot + count)
        self._free = list(reversed(self._slots))
        self._by_key: OrderedDict[bytes, int] = OrderedDict()
        """The one that was not used for the longest time comes first."""
        self._growing: dict[int, int] = {}
        """Slots of answers that still grow, by sequence."""
        self._promised: set[bytes] = set()

    def find(self, keys: Ordered[bytes]) -> tuple[int, int]:
        """Return how many of the blocks have a state at their end, and its slot; (0, -1) without one."""
        for count in range(len(keys), 0, -1):
            slot = self._by_key.get(keys[count - 1])
            if slot is not None:
                self._by_key.move_to_end(keys[count - 1])
                return count, slot
        return 0, -1

    def expects(self, keys: Ordered[bytes]) -> bool:
        """Return True if a running sequence is about to reach the end of one of these blocks."""
        return any(key in self._promised for key in keys)

    def begin(self, seq: Sequence, reused: int, found: int, last: int) -> None:
        """Note where the state of a prompt will be copied that starts after ``reused`` blocks.

        ``found``: how many of its blocks others have computed. ``last``: its last full block with tokens behind it.
        """
        first = reused + 1
        marks = {found, last, *range(-(-first // INTERVAL) * INTERVAL, last, INTERVAL)}
        seq.save_points = sorted((mark for mark in marks if first <= mark <= last), reverse=True)
        self._promised.update(seq.block_keys[mark - 1] for mark in seq.save_points)

    def save_prompt(self, seq: Sequence, blocks: int) -> int | None:
        """Return the slot to copy the state at the end of so many blocks to; None if it is not to be copied."""
        if not seq.save_points or seq.save_points[-1] != blocks:
            return None
        key = seq.block_keys[seq.save_points.pop() - 1]
        self._promised.discard(key)
        if key in self._by_key or (slot := self._take()) is None:
            return None
        self._by_key[key] = slot
        return slot

    def save_answer(self, seq: Sequence, blocks: int) -> int | None:
        """Return the slot to copy the state of a growing answer to; None while too many others have one.

        The key of its last block follows when all of its tokens are known; see `name`.
        """
        slot = self._growing.get(seq.sequence_id)
        if slot is None:
            if len(self._growing) >= len(self._slots) // 2 or (slot := self._take()) is None:
                return None
            self._growing[seq.sequence_id] = slot
        seq.saved_blocks = blocks
        return slot

    def name(self, seq: Sequence, known_blocks: int) -> None:
        """Make the copy of an answer's state known, if the keys of so many blocks are."""
        if not 0 < seq.saved_blocks <= known_blocks:
            return
        key, slot = seq.block_keys[seq.saved_blocks - 1], self._growing.pop(seq.sequence_id)
        seq.saved_blocks = 0
        if key in self._by_key:
            self._free.append(slot)
            return
        self._by_key[key] = slot
        if seq.answer_key in self._by_key:
            self._free.append(self._by_key.pop(seq.answer_key))
        seq.answer_key = key

    def end(self, seq: Sequence) -> None:
        """Forget what a sequence was about to compute."""
        self._promised.difference_update(seq.block_keys[mark - 1] for mark in seq.save_points)
        if (slot := self._growing.pop(seq.sequence_id, None)) is not None:
            self._free.append(slot)
        seq.save_points, seq.saved_blocks, seq.answer_key = [], 0, b""

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        return self._by_key.popitem(last=False)[1] if self._by_key else None

    def check_integrity(self) -> None:
        """Prove that every slot is in one place. AssertionError if not."""
        held = [*self._free, *self._by_key.values(), *self._growing.values()]
        assert sorted(held) == list(self._slots), "snapshots do not add up"
