"""Decode attention on the CPU without gathering: the rows' contexts stay copied out between steps.

Gathering a context from its pages reads and writes all of it, in every layer of every step, only to read it once more.
While the same rows go on decoding, one token a step, the copy of the last step lacks just that token. So the copy is
kept, one run of memory per row and KV head, and the products are two batched matrix multiplications over it.
"""

# R rows, J KV heads, G query heads per KV head, A = R * J, K head dim, S longest context, C capacity of the copy

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.worker.batch import StepBatch
from mgpu.worker.kv_cache import LayerCache

MAX_BYTES = 64 << 20
"""Largest copy of one layer's keys; longer or wider batches are gathered as before."""
_GROWTH = 64
"""Tokens of room beyond the longest context, so that the copy is not remade at every step."""


@dataclass(slots=True)
class _LayerCopy:
    keys_RJCK: Tensor
    values_RJCK: Tensor
    version: int
    memory: tuple[Tensor, Tensor]
    """What keys and values lie in, flat, with room."""


class DecodeMirror:
    """The copies of all layers, and which contexts they hold."""

    def __init__(self) -> None:
        self._copies: dict[int, _LayerCopy] = {}
        self._tables_RB: Tensor | None = None
        self._lens: list[int] = []
        self._capacity = 0
        self._version = 0
        """Counts the times that all copies became out of date."""

    def forget(self) -> None:
        """Note a step that wrote to the cache without this copy."""
        self._tables_RB = None

    def begin_step(self, batch: StepBatch) -> "MirrorStep":
        """Prepare a step in which every row has one new token."""
        lens = batch.context_lens_host
        if not self._continues(batch.block_tables, lens):
            self._version += 1
            self._capacity = max(lens) + _GROWTH
        self._tables_RB, self._lens = batch.block_tables.clone(), list(lens)
        return MirrorStep(self, batch)

    def _continues(self, tables_RB: Tensor, lens: list[int]) -> bool:
        """Say whether these are the rows of the last step, each with one more token.

        Blocks name the rows: other contents get into a row's blocks only by a step that is not its continuation.
        """
        before_RB = self._tables_RB
        if before_RB is None or max(lens) > self._capacity or lens != [count + 1 for count in self._lens]:
            return False
        width = min(before_RB.shape[1], tables_RB.shape[1])
        return torch.equal(before_RB[:, :width], tables_RB[:, :width])

    def layer(self, cache: LayerCache, rows: int) -> tuple[_LayerCopy, bool]:
        """Give a layer's copy, and whether it holds the contexts up to the last step."""
        copy = self._copies.get(id(cache))
        num_kv, dim = cache.k_NBJK.shape[2:]
        shape = (rows, num_kv, self._capacity, dim)
        if copy is None or copy.keys_RJCK.shape != shape:
            copy = self._copies[id(cache)] = _blank_copy(cache, shape, copy)
        is_current = copy.version == self._version
        copy.version = self._version
        return copy, is_current


def _blank_copy(cache: LayerCache, shape: tuple[int, ...], old: _LayerCopy | None) -> _LayerCopy:
    """Give a copy of another shape, in the memory of the old one if it fits there.

    The shape changes with every request that comes or goes: made anew each time, the copies fragmented the heap.
    """
    size = math.prod(shape)
    memory = old.memory if old is not None else None
    if memory is None or memory[0].numel() < size:
        with_room = size + size // 4
        memory = cache.k_NBJK.new_empty(with_room), cache.v_NBJK.new_empty(with_room)
    # Zeros, since what lies past a context is multiplied by a probability of 0, and must not be NaN.
    keys_RJCK, values_RJCK = (flat[:size].view(shape).zero_() for flat in memory)
    return _LayerCopy(keys_RJCK, values_RJCK, -1, memory)


class MirrorStep:
    """One step over the copies; the new tokens are in the paged cache already."""

    def __init__(self, mirror: DecodeMirror, batch: StepBatch) -> None:
        self._mirror = mirror
        self._lens = batch.context_lens_host
        self._longest = max(self._lens)
        self._places_A: Tensor | None = None
        self._mask_A1S: Tensor | None = None

    def attend(
        self,
        q_RHK: Tensor,
        k_RJK: Tensor,
        v_RJK: Tensor,
        cache: LayerCache,
        scale: float,
        context_slots: Callable[[], Tensor],
    ) -> Tensor:
        """Give [R, H, K]. ``context_slots``, where the contexts are in the cache, is asked for a new copy only."""
        rows, num_kv, dim = k_RJK.shape
        copy, is_current = self._mirror.layer(cache, rows)
        for store_NBJK, new_RJK, held_RJCK in (
            (cache.k_NBJK, k_RJK, copy.keys_RJCK),
            (cache.v_NBJK, v_RJK, copy.values_RJCK),
        ):
            if is_current:
                places_A = self._new_places(num_kv, held_RJCK.shape[2])
                held_RJCK.view(-1, dim).index_copy_(0, places_A, new_RJK.reshape(-1, dim))
            else:
                store_NJK = store_NBJK.flatten(0, 1)
                context = store_NJK.index_select(0, context_slots()).view(rows, -1, num_kv, dim)
                held_RJCK[:, :, : self._longest] = context.transpose(1, 2)
        keys_ASK = copy.keys_RJCK.flatten(0, 1)[:, : self._longest]
        values_ASK = copy.values_RJCK.flatten(0, 1)[:, : self._longest]
        q_AGK = q_RHK.reshape(rows * num_kv, -1, dim)
        scores_AGS = torch.baddbmm(self._mask(q_RHK.dtype, num_kv), q_AGK, keys_ASK.transpose(1, 2), alpha=scale)
        return torch.bmm(scores_AGS.softmax(-1), values_ASK).view(q_RHK.shape)

    def _new_places(self, num_kv: int, capacity: int) -> Tensor:
        """Index of each row's newest token, per KV head, in a copy seen as [R * J * C, K]."""
        if self._places_A is None:
            heads = torch.arange(len(self._lens) * num_kv) * capacity
            newest = torch.tensor(self._lens).sub_(1).repeat_interleave(num_kv)
            self._places_A = heads + newest
        return self._places_A

    def _mask(self, dtype: torch.dtype, num_kv: int) -> Tensor:
        """Give what is added to the scores: 0, or -inf past a row's context."""
        if self._mask_A1S is None:
            places_1S = torch.arange(self._longest).unsqueeze(0)
            lens_R1 = torch.tensor(self._lens).unsqueeze(1)
            mask_RS = torch.zeros((len(self._lens), self._longest), dtype=dtype)
            mask_RS.masked_fill_(places_1S >= lens_R1, -torch.inf)
            self._mask_A1S = mask_RS.repeat_interleave(num_kv, 0).unsqueeze(1)
        return self._mask_A1S
