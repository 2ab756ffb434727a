"""Decoding from transposed keys equals gathering contexts, through every change of the batch."""

import torch

from harness.ranks.stage_driver import Row, make_batch
from mgpu.worker.attention.cpu_decode import _GROWTH
from mgpu.worker.attention.interface import AttentionSpec
from mgpu.worker.attention.plain_backend import PlainBackend, PlainStep
from mgpu.worker.state.kv_cache import KvCache

BLOCK, HEADS, KV_HEADS, DIM = 4, 6, 2, 16
SPEC = AttentionSpec(scale=DIM**-0.5, window=None)


class Pair:
    """Two caches that see the same steps: one backend keeps transposed keys, the other always gathers."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.backends = PlainBackend(), PlainBackend()
        shape = (1, 200, BLOCK, KV_HEADS, DIM)
        self.caches = [KvCache(*shape, torch.float32, torch.device("cpu")) for _ in range(2)]
        for cache in self.caches:
            cache.layers[0].k_NBJK.fill_(torch.nan)
            cache.layers[0].v_NBJK.fill_(torch.nan)

    def step(self, rows: list[tuple[Row, int]]) -> None:
        """Add new tokens to each row, and compare the outputs."""
        batch = make_batch([(row, [0] * count) for row, count in rows], BLOCK)
        total = sum(count for _, count in rows)
        q, k, v = (torch.randn(total, heads, DIM, generator=self.generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
        outputs = []
        for backend, cache, keeps in zip(self.backends, self.caches, (True, False), strict=True):
            attention = backend.begin_step(batch, BLOCK)
            assert isinstance(attention, PlainStep)
            if not keeps:
                attention._cpu_decode = None
            outputs.append(attention.attend(q, k, v, cache.layers[0], SPEC))
        torch.testing.assert_close(*outputs)


def rows_of(count: int, blocks_each: int) -> list[Row]:
    return [Row(list(range(i * blocks_each, (i + 1) * blocks_each))) for i in range(count)]


def test_rows_that_go_on_decoding_outgrow_the_copy() -> None:
    pair, rows = Pair(), rows_of(3, 30)
    for length, row in zip((5, 1, 17), rows, strict=True):
        pair.step([(row, length)])
    keys = pair.backends[0].transposed_keys
    versions = []
    for _ in range(_GROWTH + 6):
        pair.step([(row, 1) for row in rows])
        versions.append(keys._version)
    assert versions[-1] == versions[0] + 1  # made once, and again when it was full


def test_rows_that_come_and_go() -> None:
    pair, rows = Pair(), rows_of(5, 8)
    for row in rows[:4]:
        pair.step([(row, 3 + len(rows))])
    pair.step([(row, 1) for row in rows[:4]])
    pair.step([(row, 1) for row in rows[:3]])  # one leaves
    pair.step([(rows[4], 7), *((row, 1) for row in rows[:3])])  # one arrives beside the others
    pair.step([(row, 1) for row in rows[:3]])
    pair.step([(row, 1) for row in [rows[4], *rows[:3]]])
    pair.step([(row, 1) for row in reversed(rows[:3])])  # another order


def test_blocks_that_pass_to_another_request() -> None:
    pair, (row,) = Pair(), rows_of(1, 8)
    pair.step([(row, 6)])
    pair.step([(row, 1)])
    successor = Row(row.blocks)
    pair.step([(successor, 7)])
    pair.step([(successor, 1)])  # as long as its predecessor would be now
    pair.step([(successor, 1)])


def test_a_copy_of_another_shape_lies_in_the_memory_of_the_old_one_if_it_fits() -> None:
    pair, rows = Pair(), rows_of(4, 30)
    for row in rows:
        pair.step([(row, 20)])
    places = []
    for count in (4, 2, 3, 4, 1):
        pair.step([(row, 1) for row in rows[:count]])
        (copy,) = pair.backends[0].transposed_keys._copies.values()
        places.append(copy.keys_RJKC.data_ptr())
    assert len(set(places)) == 1
