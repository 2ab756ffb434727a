"""Attention over the paged KV cache: the interface of the backends, and the reference one in plain torch.

A backend is a function that prepares one step; what it gives is called once per layer. `select_backend` is where a
faster one is plugged in.
"""

# T tokens, R rows of the kind at hand, H query heads, J KV heads, G = H / J query heads per KV head, K head dim,
# S longest context of those rows, Q tokens of one row, N slots of the cache

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.worker.batch import StepBatch
from mgpu.worker.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is constant in one layer. ``window``: a token sees itself and the ``window - 1`` before it; None: all."""

    scale: float
    window: int | None


class StepAttention(Protocol):
    """Attention of one step, for all of its layers."""

    def attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        """Write the new keys and values to their slots, then give the attention output [T, H, K]."""
        ...


AttentionBackend = Callable[[StepBatch, int], StepAttention]
"""``backend(batch, block_size)``: prepare what the layers share. Entries of the cache that no token of the step can see
may be NaN, and must not reach the output."""


def select_backend(device: torch.device) -> AttentionBackend:
    """Choose the attention of a worker, once."""
    del device  # one backend so far
    return ReferenceAttention


@dataclass(slots=True)
class _DecodeView:
    """Where the contexts of the decode rows are: slots to gather, and what to ignore of them."""

    slots: Tensor
    """int64 [R * S]. Places past a row's context repeat its last token, so that nothing unwritten is read."""
    mask_R11S: Tensor | None
    """Added to the scores: 0 or -inf. None when all contexts are equally long."""


@dataclass(slots=True)
class _PrefillView:
    """What one row with several new tokens sees."""

    slots: Tensor | None
    """int64 [S]: the context's slots, or None when it is exactly the row's new tokens."""
    mask_QS: Tensor | None
    """True where a query sees a key; None: plain causal."""


@dataclass(slots=True)
class _PrefillRow:
    index: int
    start: int
    end: int
    context_len: int
    views: dict[int | None, _PrefillView] = field(default_factory=dict)


class ReferenceAttention:
    """One step in plain torch: rows with one new token in a single call, the others one by one.

    Views of the cache depend on the window only, so they are built by the first layer of each window.
    """

    def __init__(self, batch: StepBatch, block_size: int) -> None:
        self._batch = batch
        self._block_size = block_size
        self._decode_rows = [row for row, count in enumerate(batch.query_lens_host) if count == 1]
        self._decode_views: dict[int | None, _DecodeView] = {}
        self._prefill_rows: list[_PrefillRow] = []
        start = 0
        decode_tokens = []
        for row, count in enumerate(batch.query_lens_host):
            if count == 1:
                decode_tokens.append(start)
            elif count > 1:
                self._prefill_rows.append(_PrefillRow(row, start, start + count, batch.context_lens_host[row]))
            start += count
        device = batch.slots.device
        if self._prefill_rows and decode_tokens:
            self._decode_tokens = torch.tensor(decode_tokens, device=device)
            self._decode_index = torch.tensor(self._decode_rows, device=device)

    def attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        slots_NJK = _slots_of(cache)
        slots_NJK[0].index_copy_(0, self._batch.slots, k_TJK)
        slots_NJK[1].index_copy_(0, self._batch.slots, v_TJK)
        if not self._prefill_rows:
            return self._decode(q_THK, slots_NJK, spec)
        out_THK = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
        if self._decode_rows:
            q_RHK = q_THK.index_select(0, self._decode_tokens)
            out_THK.index_copy_(0, self._decode_tokens, self._decode(q_RHK, slots_NJK, spec))
        for row in self._prefill_rows:
            tokens = slice(row.start, row.end)
            view = self._prefill_view(row, spec.window)
            if view.slots is None:
                k_SJK, v_SJK = k_TJK[tokens], v_TJK[tokens]
            else:
                k_SJK, v_SJK = (store.index_select(0, view.slots) for store in slots_NJK)
            out_THK[tokens] = _prefill(q_THK[tokens], k_SJK, v_SJK, view.mask_QS, spec.scale)
        return out_THK

    def _decode(self, q_RHK: Tensor, slots_NJK: tuple[Tensor, Tensor], spec: AttentionSpec) -> Tensor:
        """Attend with one token per row: the G query heads of a KV head are the queries of one call."""
        if spec.window not in self._decode_views:
            self._decode_views[spec.window] = self._decode_view(spec.window, q_RHK.dtype)
        view = self._decode_views[spec.window]
        rows, num_q, dim = q_RHK.shape
        num_kv = slots_NJK[0].shape[1]
        k_RJSK, v_RJSK = (
            store.index_select(0, view.slots).view(rows, -1, num_kv, dim).transpose(1, 2) for store in slots_NJK
        )
        q_RJGK = q_RHK.reshape(rows, num_kv, num_q // num_kv, dim)
        out_RJGK = F.scaled_dot_product_attention(q_RJGK, k_RJSK, v_RJSK, attn_mask=view.mask_R11S, scale=spec.scale)
        return out_RJGK.reshape(rows, num_q, dim)

    def _decode_view(self, window: int | None, dtype: torch.dtype) -> _DecodeView:
        lens = [self._batch.context_lens_host[row] for row in self._decode_rows]
        shown = [min(count, window or count) for count in lens]
        context_R, tables = self._batch.context_lens.long(), self._batch.block_tables
        if self._prefill_rows:
            context_R, tables = context_R[self._decode_index], tables[self._decode_index]
        first_R1 = (context_R if window is None else context_R.clamp(max=window)).neg().add(context_R).unsqueeze(1)
        places_RS = first_R1 + torch.arange(max(shown), device=tables.device)
        beyond_RS = places_RS >= context_R.unsqueeze(1)
        slots_RS = self._slots(places_RS.minimum(context_R.unsqueeze(1) - 1), tables)
        if min(shown) == max(shown):
            return _DecodeView(slots_RS.flatten(), None)
        mask_RS = torch.zeros(beyond_RS.shape, dtype=dtype, device=tables.device).masked_fill_(beyond_RS, -torch.inf)
        return _DecodeView(slots_RS.flatten(), mask_RS[:, None, None, :])

    def _slots(self, places_RS: Tensor, tables_RB: Tensor) -> Tensor:
        """Turn positions of each row into slots of the cache."""
        blocks_RS = tables_RB.long().gather(1, places_RS // self._block_size)
        return blocks_RS * self._block_size + places_RS % self._block_size

    def _prefill_view(self, row: _PrefillRow, window: int | None) -> _PrefillView:
        if window not in row.views:
            row.views[window] = self._make_prefill_view(row, window)
        return row.views[window]

    def _make_prefill_view(self, row: _PrefillRow, window: int | None) -> _PrefillView:
        query_len = row.end - row.start
        is_windowed = window is not None and row.context_len > window
        if row.context_len == query_len and not is_windowed:
            return _PrefillView(None, None)
        first_query = row.context_len - query_len
        first_key = max(0, first_query - window + 1) if window is not None else 0
        device = self._batch.slots.device
        keys_1S = torch.arange(first_key, row.context_len, device=device).unsqueeze(0)
        queries_Q1 = torch.arange(first_query, row.context_len, device=device).unsqueeze(1)
        mask_QS = keys_1S <= queries_Q1
        if window is not None:
            mask_QS &= keys_1S > queries_Q1 - window
        if row.context_len == query_len:
            return _PrefillView(None, mask_QS)
        table_1B = self._batch.block_tables[row.index : row.index + 1]
        return _PrefillView(self._slots(keys_1S, table_1B).flatten(), mask_QS)


def _slots_of(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """View keys and values as [N, J, K], one entry per slot."""
    return cache.k_NBJK.flatten(0, 1), cache.v_NBJK.flatten(0, 1)


def _prefill(q_QHK: Tensor, k_SJK: Tensor, v_SJK: Tensor, mask_QS: Tensor | None, scale: float) -> Tensor:
    """Attend with many tokens of one row; keys are shared by the G query heads without being copied."""
    num_kv = k_SJK.shape[1]
    groups = q_QHK.shape[1] // num_kv
    q_JGQK = q_QHK.view(len(q_QHK), num_kv, groups, -1).permute(1, 2, 0, 3)
    k_JGSK = k_SJK.transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)
    v_JGSK = v_SJK.transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)
    out_JGQK = F.scaled_dot_product_attention(
        q_JGQK, k_JGSK, v_JGSK, attn_mask=mask_QS, is_causal=mask_QS is None, scale=scale
    )
    return out_JGQK.permute(2, 0, 1, 3).reshape(q_QHK.shape)
