"""Account for the blocks of the KV pool: which are held, which can be reused, which is evicted next.

Integers only: the blocks themselves live on the workers. A full block may carry a key that stands for all tokens up to
its end, so a sequence that begins alike takes the block instead of computing it. A block without a holder keeps its
content and key until space is needed and it is the least recently used one.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def extend_block_keys(keys: list[bytes], tokens: "array[int]", block_size: int, num_blocks: int, salt: bytes) -> None:
    """Append to ``keys`` until it covers ``num_blocks`` full blocks of ``tokens``.

    A key is SHA-256 over the previous key and the block's tokens, so it stands for the whole prefix; the first one is
    chained to the salt, so that sequences of different salts never meet.
    """
    parent = keys[-1] if keys else hashlib.sha256(salt).digest()
    for index in range(len(keys), num_blocks):
        block = tokens[index * block_size : (index + 1) * block_size].tobytes()
        parent = hashlib.sha256(parent + block).digest()
        keys.append(parent)


class BlockPool:
    """Blocks ``[0, num_blocks)`` with reference counts, a key index and least-recently-used eviction."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks without a holder, with reusable content or not."""
        return len(self._blank) + len(self._reusable)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix, without taking them."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """Count the ``blocks`` without a holder: taking them uses up free blocks."""
        holders = self._holders
        return sum(not holders[block] for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of ``blocks``."""
        for block in blocks:
            if not self._holders[block]:
                del self._reusable[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks: empty ones first, then the least recently used. The caller checks `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        return [self._allocate_one() for _ in range(count)]

    def _allocate_one(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            del self._by_key[key]
            self._keys[block] = None
        self._holders[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one holder from each of ``blocks``, a sequence's table in order: its tail is evicted first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, f"block {block} released twice"
            if not self._holders[block]:
                if self._keys[block] is None:
                    self._blank.append(block)
                else:
                    self._reusable[block] = None

    def register(self, block: int, key: bytes) -> None:
        """Register a full block for reuse. If the key is known already, the older block stays the one to reuse."""
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def is_known(self, block: int) -> bool:
        """Return True if a block is registered: what begins alike finds it."""
        return self._keys[block] is not None

    def unregister(self, key: bytes) -> int:
        """Forget a registered key, so that another block can have it; return the block that had it."""
        block = self._by_key.pop(key)
        self._keys[block] = None
        if not self._holders[block]:
            del self._reusable[block]
            self._blank.append(block)
        return block

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Prove that counts equal the block tables and every block is in one place. AssertionError if not."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._holders, "reference counts differ from the block tables"
        free = sorted([*self._blank, *self._reusable])
        assert free == [block for block, count in enumerate(self._holders) if not count], "free list is wrong"
        keyed = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert keyed == self._by_key, "key index is wrong"
        assert all(self._keys[block] is None for block in self._blank), "an empty block has a key"
        assert all(self._keys[block] is not None for block in self._reusable), "a reusable block has no key"
