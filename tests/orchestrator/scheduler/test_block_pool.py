"""Reference counts, reuse by key and eviction of the KV pool."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mgpu.orchestrator.scheduler.block_pool import BlockPool, extend_block_keys


def keys_of(tokens: list[int], num_blocks: int, salt: bytes = b"") -> list[bytes]:
    keys: list[bytes] = []
    extend_block_keys(keys, array("i", tokens), 4, num_blocks, salt)
    return keys


def test_keys_stand_for_everything_before_them() -> None:
    first, second = keys_of([1, 2, 3, 4, 5, 6, 7, 8], 2), keys_of([9, 2, 3, 4, 5, 6, 7, 8], 2)
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert keys_of([1, 2, 3, 4, 0, 0, 0, 0], 2)[0] == first[0]
    assert all(len(key) * 8 >= 128 for key in first)


def test_keys_of_different_salts_differ() -> None:
    assert keys_of([1, 2, 3, 4], 1, b"a") != keys_of([1, 2, 3, 4], 1, b"b")


def test_keys_are_extended_not_recomputed() -> None:
    keys = keys_of([1, 2, 3, 4, 5, 6, 7, 8], 1)
    extend_block_keys(keys, array("i", [1, 2, 3, 4, 5, 6, 7, 8]), 4, 2, b"")
    assert keys == keys_of([1, 2, 3, 4, 5, 6, 7, 8], 2)


def test_a_released_block_is_reused_by_its_key() -> None:
    pool = BlockPool(4)
    (key,) = keys_of([1, 2, 3, 4], 1)
    blocks = pool.allocate(1)
    pool.register(blocks[0], key)
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.find([key]) == blocks
    pool.take(blocks)
    assert pool.num_free == 3
    pool.check_integrity([blocks])


def test_a_prefix_ends_at_the_first_unknown_key() -> None:
    pool = BlockPool(4)
    keys = keys_of(list(range(12)), 3)
    blocks = pool.allocate(3)
    pool.register(blocks[0], keys[0])
    pool.register(blocks[2], keys[2])
    assert pool.find(keys) == blocks[:1]


def test_blocks_without_content_are_used_first_then_the_least_recently_used() -> None:
    pool = BlockPool(3)
    keys = keys_of(list(range(8)), 2)
    older, newer = pool.allocate(1), pool.allocate(1)
    pool.register(older[0], keys[0])
    pool.register(newer[0], keys[1])
    pool.release(older)
    pool.release(newer)
    pool.allocate(1)
    assert pool.find([keys[0]]) == older
    assert pool.allocate(1) == older
    assert pool.find([keys[0]]) == []
    assert pool.find([keys[1]]) == newer


def test_the_tail_of_a_request_is_evicted_before_its_head() -> None:
    pool = BlockPool(2)
    keys = keys_of(list(range(8)), 2)
    blocks = pool.allocate(2)
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find(keys) == blocks[:1]


def test_equal_content_keeps_the_older_block_under_the_key() -> None:
    pool = BlockPool(2)
    (key,) = keys_of([1, 2, 3, 4], 1)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], key)
    pool.register(second[0], key)
    assert pool.find([key]) == first
    pool.release(first)
    pool.release(second)
    pool.check_integrity([])


def test_releasing_twice_is_noticed() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


class PoolMachine(RuleBasedStateMachine):
    """Requests that take, share and release blocks in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.tables: list[list[int]] = []

    @rule(group=st.integers(0, 2), length=st.integers(1, 4))
    def start(self, group: int, length: int) -> None:
        keys = keys_of([group] * 4 * length, length)
        reused = self.pool.find(keys)
        if length - len(reused) > self.pool.num_free - self.pool.num_idle(reused):
            return
        self.pool.take(reused)
        table = reused + self.pool.allocate(length - len(reused))
        for block, key in zip(table, keys, strict=True):
            self.pool.register(block, key)
        self.tables.append(table)

    @rule(index=st.integers(0, 20))
    def end(self, index: int) -> None:
        if self.tables:
            self.pool.release(self.tables.pop(index % len(self.tables)))

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity(self.tables)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=8), st.integers(0, 7))
def test_any_changed_token_changes_the_last_key(tokens: list[int], index: int) -> None:
    changed = tokens.copy()
    changed[index] ^= 1
    assert keys_of(tokens, 2)[1] != keys_of(changed, 2)[1]
