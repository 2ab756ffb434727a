"""Account for the keys and values of window layers: a page has those of one block, while somebody may see them.

Layers that see all of a context need all blocks of a sequence. Layers with a window, or with chunks, need the last few.
So theirs lie in a pool of their own, of fewer pages than there are blocks. A block takes a page when its tokens are
about to be computed, and keeps its number when the page is taken away again.

Example: a window of 8 tokens, blocks of 4. Before token 20 is computed, tokens 13 to 19 are in sight, so that the pages
of blocks 0 to 2 are free; a block for tokens 20 to 23 takes a page. The sequence never holds more than 3 pages while it
decodes, however long it becomes.

A page that no running sequence sees keeps its content while no other block needs it, as blocks do. A sequence that
begins alike can go on after a block if all blocks that are in sight there have their pages.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered

from mgpu.protocol.model.attention_facts import Sight, first_key, window_blocks


class WindowPages:
    """Pages ``[0, num_pages)`` of the blocks that sequences see through a window, or may soon see again."""

    def __init__(self, num_blocks: int, num_pages: int, block_size: int, sight: Sight) -> None:
        self.num_pages = num_pages
        self._block_size = block_size
        self._sight = sight
        self._page_of = [-1] * num_blocks
        self._viewers = [0] * num_blocks
        """Running sequences that have the block in sight."""
        self._free = list(range(num_pages - 1, -1, -1))
        self._unseen: OrderedDict[int, None] = OrderedDict()
        """Blocks with a page that nobody has in sight. The one that was left first comes first."""
        self._granted: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that a block can have, with content that can be reused or not."""
        return len(self._free) + len(self._unseen)

    def first_block(self, position: int) -> int:
        """Return the first block that the token at ``position`` sees."""
        return first_key(position, self._sight) // self._block_size

    @property
    def most_in_sight(self) -> int:
        """Most blocks that a sequence sees while it decodes, that of its newest token included."""
        return window_blocks(self._sight, self._block_size)

    def has_page(self, block: int) -> bool:
        return self._page_of[block] >= 0

    def reusable(self, blocks: Ordered[int]) -> int:
        """Return after how many of a sequence's first ``blocks`` it can go on: all in sight there have pages."""
        count = len(blocks)
        while count:
            in_sight = range(count - 1, self.first_block(count * self._block_size) - 1, -1)
            missing = next((index for index in in_sight if not self.has_page(blocks[index])), None)
            if missing is None:
                break
            count = missing  # what is in sight after more blocks begins no later
        return count

    def num_unseen(self, blocks: Ordered[int]) -> int:
        """Count the ``blocks`` that nobody has in sight: seeing them uses up free pages."""
        return sum(not self._viewers[block] for block in blocks)

    def see(self, blocks: Iterable[int]) -> None:
        """Add a viewer to each of ``blocks``, which have pages."""
        for block in blocks:
            if not self._viewers[block]:
                del self._unseen[block]
            self._viewers[block] += 1

    def grant(self, block: int) -> None:
        """Let a block that has no page, and that one sequence has in sight, take one. The caller checks `num_free`."""
        if self._free:
            page = self._free.pop()
        else:
            left, _ = self._unseen.popitem(last=False)
            page, self._page_of[left] = self._page_of[left], -1
        self._page_of[block] = self._granted[block] = page
        self._viewers[block] = 1

    def leave(self, blocks: Iterable[int], is_kept: Callable[[int], bool]) -> None:
        """Remove one viewer from each of ``blocks``. Pages of blocks that can be found again keep their content."""
        for block in blocks:
            self._viewers[block] -= 1
            if not self._viewers[block]:
                self._unseen[block] = None
                if not is_kept(block):
                    self.forget(block)

    def forget(self, block: int) -> None:
        """Free the page of a block whose content is lost, if nobody has it in sight."""
        if block in self._unseen:
            del self._unseen[block]
            self._free.append(self._page_of[block])
            self._page_of[block] = -1

    def move_granted(self, blocks: list[int], pages: list[int]) -> None:
        """Append the blocks that took pages since the last call, and their pages."""
        blocks.extend(self._granted)
        pages.extend(self._granted.values())
        self._granted.clear()

    def check_integrity(self, views: Iterable[Ordered[int]]) -> None:
        """Prove that viewers equal what sequences have in sight, and pages add up. AssertionError if not."""
        expected = [0] * len(self._viewers)
        for view in views:
            for block in view:
                expected[block] += 1
        assert expected == self._viewers, "viewers differ from what sequences have in sight"
        with_page = [block for block, page in enumerate(self._page_of) if page >= 0]
        assert sorted([*self._unseen, *(b for b, count in enumerate(expected) if count)]) == with_page, "a lost page"
        pages = [*self._free, *(self._page_of[block] for block in with_page)]
        assert sorted(pages) == list(range(self.num_pages)), "pages do not add up"
