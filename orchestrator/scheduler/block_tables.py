"""The block tables of sequences: reuse computed blocks, register new ones, grow while a sequence decodes.

Blocks that have left the window of window layers are given up there, and blocks that come into sight take a page; see
window_pages.py.
"""

from mgpu.orchestrator.scheduler.block_pool import BlockPool, extend_block_keys
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.orchestrator.scheduler.snapshots import Snapshots
from mgpu.orchestrator.scheduler.window_pages import WindowPages

ENTRY_TOKENS = 1024
"""Tokens of a prompt beside its window that find pages before it begins: in shorter steps it would take too long."""


class BlockTables:
    """The block tables of all sequences on top of one pool."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_cache: bool,
        snapshots: Snapshots | None = None,
        pages: WindowPages | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.pages = pages
        """Of models whose window layers have a pool of their own."""
        self.snapshots = snapshots if prefix_cache else None
        """Of models with linear layers."""
        self.changes = 0
        """Counts releases and registrations: a sequence that got no blocks waits for the next one."""
        self._block_size = block_size
        self._entry_pages = 0
        """Most pages that a sequence must find before it begins."""
        if pages is not None:
            self._entry_pages = min(pages.most_in_sight + -(-ENTRY_TOKENS // block_size), pages.num_pages)
        self._prefix_cache = prefix_cache
        self._promised: set[bytes] = set()
        """Keys of prompt blocks that running sequences are about to compute."""

    def has_room(self, num_tokens: int, reserve: int) -> bool:
        """Return whether a sequence of so many tokens finds room beside ``reserve`` blocks, and pages, that stay."""
        needed = -(-num_tokens // self._block_size)
        has_pages = self.pages is None or min(needed, self._entry_pages) + reserve <= self.pages.num_free
        return has_pages and needed + reserve <= self.pool.num_free

    def take(self, seq: Sequence, reserve: int, spare: float = 0.0) -> bool:
        """Take blocks for all known tokens of a sequence, reused ones where they exist.

        False, with nothing taken, when fewer than ``reserve`` blocks and the part ``spare`` of all would stay free, or
        when another sequence is computing the block that this one would compute next: then it is cheaper to wait and
        reuse it.
        """
        size, num_tokens = self._block_size, len(seq.tokens)
        # The last token is always computed: its logits are what the sequence wants.
        num_reusable = (num_tokens - 1) // size if self._prefix_cache else 0
        extend_block_keys(seq.block_keys, seq.tokens, size, num_reusable, seq.cache_salt)
        reused = self.pool.find(seq.block_keys[:num_reusable])
        found, slot = len(reused), -1
        if self.snapshots is not None:
            depth, slot = self.snapshots.find(seq.block_keys[:found])
            reused = reused[:depth]
            if self.snapshots.expects(seq.block_keys[depth:num_reusable]):
                return False
        else:
            if self.pages is not None:
                reused = reused[: self.pages.reusable(reused)]
            if len(reused) < num_reusable and seq.block_keys[len(reused)] in self._promised:
                return False
        needed = -(-num_tokens // size) - len(reused)
        kept = reserve + int(spare * self.pool.num_blocks)
        if needed + kept > self.pool.num_free - self.pool.num_idle(reused):
            return False
        if self.pages is not None and not self._see_reused(seq, reused, needed, reserve, spare):
            return False
        self.pool.take(reused)
        new = self.pool.allocate(needed)
        if self.pages is not None:
            for block in new:
                self.pages.forget(block)
        seq.blocks = reused + new
        seq.num_computed = len(reused) * size
        seq.num_registered = len(reused)
        seq.state_slot = slot
        if self.snapshots is not None:
            self.snapshots.begin(seq, len(reused), found, num_reusable)
        else:
            self._promised.update(seq.block_keys[len(reused) : num_reusable])
        return True

    def tokens_to_save(self, seq: Sequence) -> int:
        """Return how many tokens of a prompt one step may compute: it must end where the state is saved."""
        if not seq.save_points:
            return len(seq.tokens)
        return seq.save_points[-1] * self._block_size - seq.num_computed

    def save_prompt(self, seq: Sequence) -> int | None:
        """Return the slot to copy a prompt's state to before its next tokens are computed; None if it is not to be."""
        if self.snapshots is None or seq.num_computed % self._block_size:
            return None
        self.changes += 1
        return self.snapshots.save_prompt(seq, seq.num_computed // self._block_size)

    def save_answer(self, seq: Sequence) -> int | None:
        """Return the slot to copy the state at the end of a sequence's blocks to; None if it is not to be."""
        return None if self.snapshots is None else self.snapshots.save_answer(seq, len(seq.blocks))

    def _see_reused(self, seq: Sequence, reused: list[int], needed: int, reserve: int, spare: float) -> bool:
        """Take what a sequence sees of its reused blocks into sight. False if too few pages are left to go on."""
        assert self.pages is not None
        end = len(reused)
        first = self.pages.first_block(end * self._block_size)
        in_sight = reused[first:]
        wanted = min(needed, self._entry_pages - len(in_sight))
        kept = reserve + int(spare * self.pages.num_pages)
        if wanted + kept > self.pages.num_free - self.pages.num_unseen(in_sight):
            return False
        self.pages.see(in_sight)
        seq.sight = range(first, end)
        return True

    def come_into_sight(self, seq: Sequence, start: int, count: int) -> int:
        """Assign pages to the blocks of a sequence's next ``count`` tokens; return how many tokens have them."""
        if self.pages is None:
            return count
        end = -(-(start + count) // self._block_size)
        end = min(end, seq.sight.stop + self.pages.num_free)
        for block in seq.blocks[seq.sight.stop : end]:
            self.pages.grant(block)
        seq.sight = range(seq.sight.start, max(end, seq.sight.stop))
        return min(count, seq.sight.stop * self._block_size - start)

    def leave_behind(self, seq: Sequence, start: int) -> None:
        """Free the pages of blocks that no token from ``start`` on sees."""
        if self.pages is not None and (first := self.pages.first_block(start)) > seq.sight.start:
            self.pages.leave(seq.blocks[seq.sight.start : first], self.pool.is_known)
            seq.sight = range(first, seq.sight.stop)
            self.changes += 1

    def grow(self, seq: Sequence) -> int | None:
        """Append one block to a sequence's table and return it; None when none is free."""
        self.leave_behind(seq, len(seq.blocks) * self._block_size)
        if not self.pool.num_free or (self.pages is not None and not self.pages.num_free):
            return None
        (block,) = self.pool.allocate(1)
        seq.blocks.append(block)
        if self.pages is not None:
            self.pages.forget(block)
            self.pages.grant(block)
            seq.sight = range(seq.sight.start, len(seq.blocks))
        return block

    def register(self, seq: Sequence, num_computed: int) -> None:
        """Register the full blocks of a sequence for reuse; published plans compute ``num_computed`` of its tokens."""
        if not self._prefix_cache:
            return
        num_full = min(num_computed, len(seq.tokens)) // self._block_size
        if num_full <= seq.num_registered:
            return
        extend_block_keys(seq.block_keys, seq.tokens, self._block_size, num_full, seq.cache_salt)
        for index in range(seq.num_registered, num_full):
            self._forget_older(seq.block_keys[index])
            self.pool.register(seq.blocks[index], seq.block_keys[index])
        self._promised.difference_update(seq.block_keys[seq.num_registered : num_full])
        seq.num_registered = num_full
        if self.snapshots is not None:
            self.snapshots.name(seq, num_full)
        self.changes += 1

    def _forget_older(self, key: bytes) -> None:
        """Forget the block of a key if it has no page, for one that has just been computed."""
        if self.pages is not None and any(not self.pages.has_page(block) for block in self.pool.find([key])):
            self.pool.unregister(key)

    def release(self, seq: Sequence) -> None:
        """Take a sequence's blocks away. Registered ones stay reusable until their space is needed."""
        self.register(seq, seq.num_computed)
        self._promised.difference_update(seq.block_keys[seq.num_registered : len(seq.blocks)])
        if self.snapshots is not None:
            self.snapshots.end(seq)
        if self.pages is not None:
            self.pages.leave(seq.blocks[seq.sight.start : seq.sight.stop], self.pool.is_known)
        self.pool.release(seq.blocks)
        seq.blocks, seq.sight = [], range(0)
        self.changes += 1
