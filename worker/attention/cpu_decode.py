"""Decode attention on the CPU without gathering contexts, as two sums over rows of a table.

Gathering a context from its pages reads and writes all of it, in every layer of every step, only to read it once more;
and the CPU's matrix library multiplies so few rows at a tenth of its speed. Both halves of attention are weighted sums
of chosen rows of a table, and torch has a fast operator for that, the embedding bag:

- the output of a head is the sum of its context's values, weighted by the probabilities. The table is the paged cache
  itself, the chosen rows are the context's slots;
- the scores of a head are the sum over the head's dimensions of the keys' components, weighted by the query's. The
  table has a row per dimension, with that component of all keys: a transposed copy. It is kept while the same rows go
  on decoding, one token a step; each step adds that token.

Worked example: one head of 2 dimensions, keys (1, 2), (3, 4), (5, 6). The copy has the rows [1, 3, 5] and [2, 4, 6].
The query (10, 1) makes the scores 10 * [1, 3, 5] + 1 * [2, 4, 6] = [12, 34, 56], without a product of matrices.
"""

# R rows, J KV heads, H query heads, G = H / J, K head dim, S longest context, C capacity of the copy (tokens)

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import LayerCache

MAX_BYTES = 64 << 20
"""Largest copy of one layer's keys; for longer or wider batches, contexts are gathered."""
_GROWTH = 64
"""Capacities are multiples of this many tokens, so that a copy is not made anew at every step."""


class Heads(NamedTuple):
    """The shape of one layer's attention."""

    num_q: int
    num_kv: int
    dim: int


@dataclass(slots=True)
class _KeyCopy:
    keys_RJKC: Tensor
    version: int
    memory: Tensor
    """Flat, with room to grow; ``keys_RJKC`` is a view of its beginning."""


class TransposedKeys:
    """The transposed copies of all layers' keys, and the contexts that they hold."""

    def __init__(self) -> None:
        self._copies: dict[int, _KeyCopy] = {}
        self._tables_RB: Tensor | None = None
        self._lens: list[int] = []
        self._version = 0
        """Counts how often all copies became out of date."""
        self.capacity = 0

    def forget(self) -> None:
        """Mark the copies as out of date: a step wrote to the cache only."""
        self._tables_RB = None

    def begin_step(self, batch: StepBatch, context_slots: Callable[[], Tensor]) -> "CpuDecodeStep":
        """Prepare a step in which every row has one new token.

        ``context_slots`` returns the slots of the contexts, [R * S]; places past a context repeat its last.
        """
        lens = batch.context_lens_host
        if not self._continues(batch.block_tables, lens):
            self._version += 1
            self.capacity = -(-(max(lens) + 1) // _GROWTH) * _GROWTH
        self._tables_RB, self._lens = batch.block_tables.clone(), list(lens)
        return CpuDecodeStep(self, lens, context_slots)

    def _continues(self, tables_RB: Tensor, lens: list[int]) -> bool:
        """Return whether these are the rows of the last step, each with one more token.

        Blocks identify the rows: only a step that does not continue a row can change the contents of its blocks.
        """
        before_RB = self._tables_RB
        if before_RB is None or max(lens) > self.capacity or lens != [count + 1 for count in self._lens]:
            return False
        width = min(before_RB.shape[1], tables_RB.shape[1])
        return torch.equal(before_RB[:, :width], tables_RB[:, :width])

    def keys(self, cache: LayerCache, rows: int) -> tuple[Tensor, bool]:
        """Return a layer's copy [R, J, K, C], and whether it holds the contexts up to the last step."""
        copy = self._copies.get(id(cache))
        num_kv, dim = cache.k_NBJK.shape[2:]
        shape = (rows, num_kv, dim, self.capacity)
        if copy is None or copy.keys_RJKC.shape != shape:
            copy = self._copies[id(cache)] = _blank_copy(cache, shape, copy)
        is_current = copy.version == self._version
        copy.version = self._version
        return copy.keys_RJKC, is_current


def _blank_copy(cache: LayerCache, shape: tuple[int, ...], old: _KeyCopy | None) -> _KeyCopy:
    """Return a copy of another shape, in the memory of the old one if it fits there.

    The shape changes with every request that arrives or ends. Copies in fresh memory each time fragmented the heap.
    """
    size = math.prod(shape)
    memory = old.memory if old is not None else None
    if memory is None or memory.numel() < size:
        memory = cache.k_NBJK.new_empty(size + size // 4)
    # Zeros: places past a context are masked, but they must hold numbers.
    return _KeyCopy(memory[:size].view(shape).zero_(), -1, memory)


class _Bags:
    """The rows of both tables that one step chooses, for layers of one shape.

    Made when the first such layer attends: a step whose layers all gather, for their window or dtype, needs none.
    """

    def __init__(self, heads: Heads, lens: list[int], slots_RS: Tensor, capacity: int) -> None:
        rows, longest = slots_RS.shape
        num_q, num_kv, dim = heads
        shape = (rows * num_kv, num_q // num_kv)
        pairs_A = torch.arange(rows * num_kv)
        parts_AK = pairs_A.unsqueeze(1) * dim + torch.arange(dim)
        self.key_rows = parts_AK.unsqueeze(1).expand(*shape, dim).reshape(-1)
        self.key_starts = torch.arange(0, rows * num_q * dim, dim)
        values_RJS = slots_RS.unsqueeze(1) * num_kv + torch.arange(num_kv).unsqueeze(1)
        self.value_rows = values_RJS.view(-1, 1, longest).expand(*shape, longest).reshape(-1)
        self.value_starts = torch.arange(0, rows * num_q * longest, longest)
        newest_R = torch.tensor(lens) - 1
        self.new_places = (parts_AK * capacity + newest_R.repeat_interleave(num_kv).unsqueeze(1)).view(rows, -1)
        self.slots = slots_RS.flatten()
        is_past_RS = torch.arange(longest).unsqueeze(0) > newest_R.unsqueeze(1)
        self.mask_R1S = torch.zeros((rows, longest)).masked_fill_(is_past_RS, -torch.inf).unsqueeze(1)


class CpuDecodeStep:
    """One step over the copies. Its new tokens are in the paged cache already."""

    def __init__(self, transposed_keys: TransposedKeys, lens: list[int], context_slots: Callable[[], Tensor]) -> None:
        self._keys = transposed_keys
        self._lens = lens
        self._longest = max(lens)
        self._context_slots = context_slots
        self._bags: dict[Heads, _Bags] = {}

    def of_slots(self, context_slots: Callable[[], Tensor]) -> "CpuDecodeStep":
        """Return the same step over caches that keep the contexts in other slots."""
        return CpuDecodeStep(self._keys, self._lens, context_slots)

    def attend(self, q_RHK: Tensor, k_RJK: Tensor, cache: LayerCache, scale: float) -> Tensor:
        """Return the output [R, H, K], float32."""
        rows, num_kv, dim = k_RJK.shape
        heads = Heads(q_RHK.shape[1], num_kv, dim)
        bags = self._bags.get(heads)
        if bags is None:
            slots_RS = self._context_slots().view(rows, -1)
            bags = self._bags[heads] = _Bags(heads, self._lens, slots_RS, self._keys.capacity)
        keys_RJKC, is_current = self._keys.keys(cache, rows)
        if is_current:
            keys_RJKC.put_(bags.new_places, k_RJK)
        else:
            context = cache.k_NJK.index_select(0, bags.slots).view(rows, -1, num_kv, dim)
            keys_RJKC[..., : self._longest] = context.permute(0, 2, 3, 1)
        table = keys_RJKC.view(rows * num_kv * dim, -1)
        scores = _sum_rows(table, bags.key_rows, bags.key_starts, q_RHK.reshape(-1))
        scores_RHS = scores.view(rows, heads.num_q, -1)[..., : self._longest]
        probabilities = torch.add(bags.mask_R1S, scores_RHS, alpha=scale).softmax(-1)
        values = cache.v_NJK.view(-1, dim)
        return _sum_rows(values, bags.value_rows, bags.value_starts, probabilities.view(-1)).view(q_RHK.shape)


def _sum_rows(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return a weighted sum of rows of ``table`` for each run of ``rows`` that begins at one of ``starts``."""
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]  # F's wrapper costs 4 us more
