"""Attention in plain torch, for every device and dtype: gather the context of each row, then torch's fused attention.

Rows with one new token (decoding) are computed together, the query heads of a KV head being the queries of one call.
Rows with more (prefill) are computed one by one. Keys are never copied once per query head.
"""

# T tokens, R rows of one decoding group, H query heads, J KV heads, G = H / J query heads per KV head, K head dim,
# S longest context that the rows see, Q new tokens of one prefill row, N slots of the cache

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mgpu.protocol.model.attention_facts import Sight, first_key
from mgpu.worker.attention.cpu_decode import MAX_BYTES, CpuDecodeStep, TransposedKeys
from mgpu.worker.attention.interface import AttentionSpec
from mgpu.worker.attention.plain_attention import attend
from mgpu.worker.kernels.cpu import layers as cpu_layers
from mgpu.worker.state.batch import StepBatch, StepRows
from mgpu.worker.state.kv_cache import LayerCache, widen

_SHORT_CONTEXT = 256
"""Rows with contexts up to this length are padded to one length; longer ones only with rows less than twice as long."""


class PlainBackend:
    """Keeps the memory that contexts are gathered into: fresh memory for each layer costs more than the gathering."""

    takes_packed = False
    has_states = False

    def __init__(self) -> None:
        self._scratch: dict[str, Tensor] = {}
        self.transposed_keys = TransposedKeys()

    def begin_step(self, batch: StepBatch, block_size: int) -> "PlainStep":
        return PlainStep(self, batch, block_size)

    def gather(self, store_NJK: Tensor, slots: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
        """Copy slots of a cache into this purpose's scratch memory, valid until the next call for it.

        A float8 cache is widened to ``dtype``.
        """
        shape = torch.Size((len(slots), *store_NJK.shape[1:]))
        room = self._room(store_NJK, shape, dtype, purpose)
        if store_NJK.dtype == dtype:
            return torch.index_select(store_NJK, 0, slots, out=room)
        stored = store_NJK.view(torch.uint8)  # torch copies few kinds of float8, and bytes always
        chosen = torch.index_select(stored, 0, slots, out=self._room(stored, shape, stored.dtype, f"stored {purpose}"))
        return widen(chosen, room)

    def _room(self, near: Tensor, shape: torch.Size, dtype: torch.dtype, purpose: str) -> Tensor:
        size = shape.numel()
        scratch = self._scratch.get(purpose)
        if scratch is None or scratch.numel() < size or scratch.dtype != dtype:
            scratch = near.new_empty(size + size // 2, dtype=dtype)
            self._scratch[purpose] = scratch
        return scratch[:size].view(shape)


@dataclass(slots=True)
class _View:
    """The part of the cache that a group of rows sees in layers of the same sight."""

    slots: Tensor | None
    """int64 [R * S]; None: exactly the new tokens of the (prefill) row.

    Places past a row's context repeat its last token, so that only written slots are read.
    """
    mask: Tensor | None
    """[R, 1, 1, S], added to the scores, or for prefill bool [Q, S]. None: everything, or for prefill causal."""
    counts_R: Tensor | None = None
    """int64: how many of the slots each decoding row sees."""
    run: slice | None = None
    """The same slots if they follow one another: then nothing needs to be gathered."""


@dataclass(slots=True)
class _DecodeGroup:
    rows: list[int]
    tokens: Tensor | None
    """int64 [R]: the rows' tokens; None: all tokens of the step, in order."""
    views: dict[Sight, _View] = field(default_factory=dict)


@dataclass(slots=True)
class _PrefillRow:
    row: int
    start: int
    end: int
    context_len: int
    views: dict[Sight, _View] = field(default_factory=dict)


class PlainStep:
    """One step. Views depend on the sight only: the first layer of each sight makes them for the others."""

    packed = None
    latents = None
    states = None

    def __init__(
        self, backend: PlainBackend, batch: StepBatch, block_size: int, main: "PlainStep | None" = None
    ) -> None:
        """``main``: the same step in layers that keep all blocks; None: this is it."""
        self._backend = backend
        self._batch = batch
        self.rows: StepRows | None = batch.step_rows
        self.positions_T = batch.positions
        self._block_size = block_size
        self._device = batch.slots.device
        self._longest = max(batch.context_lens_host)
        self._uses_cpu_decode: dict[int | None, bool] = {}
        self._prefill: list[_PrefillRow] = []
        decode_tokens: dict[int, int] = {}
        start = 0
        for row, count in enumerate(batch.query_lens_host):
            if count == 1:
                decode_tokens[row] = start
            elif count > 1:
                self._prefill.append(_PrefillRow(row, start, start + count, batch.context_lens_host[row]))
            start += count
        self._decode = self._group_by_length(decode_tokens)
        self._cpu_decode: CpuDecodeStep | None = None
        if main is not None:
            self._cpu_decode = None if main._cpu_decode is None else main._cpu_decode.of_slots(self._context_slots)
        elif self._is_plain_decode() and self._device.type == "cpu":
            self._cpu_decode = backend.transposed_keys.begin_step(batch, self._context_slots)
        else:
            backend.transposed_keys.forget()
        in_pages = batch.for_pages()
        self._in_pages = None if in_pages is None else PlainStep(backend, in_pages, block_size, self)

    def _is_plain_decode(self) -> bool:
        return not self._prefill and len(self._decode) == 1 and self._decode[0].tokens is None

    def _context_slots(self) -> Tensor:
        """Return the slots of the whole contexts of plain decode rows."""
        slots = self._view_of(self._decode[0], (None, False), torch.float32).slots
        assert slots is not None
        return slots

    def _decodes_on_cpu(self, k_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> bool:
        """Return whether transposed keys serve the layers of this window; the first layer decides for the others."""
        answer = self._uses_cpu_decode.get(spec.window)
        if answer is None:
            answer = self._uses_cpu_decode[spec.window] = self._can_decode_on_cpu(k_TJK, cache, spec)
        return answer

    def _can_decode_on_cpu(self, k_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> bool:
        """Return True in float32 and if no window hides a token.

        torch sums float16 products less exactly than its attention does. The sums read the cache itself, so it must be
        in float32 too.
        """
        return (
            k_TJK.dtype == cache.v_NJK.dtype == torch.float32
            and not spec.softcap
            and spec.sinks is None
            and (spec.window is None or self._longest <= spec.window)
            and self._longest * k_TJK.nbytes <= MAX_BYTES
        )

    def _group_by_length(self, decode_tokens: dict[int, int]) -> list[_DecodeGroup]:
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for row in decode_tokens:
            by_length[max(_SHORT_CONTEXT, self._batch.context_lens_host[row] - 1).bit_length()].append(row)
        if len(by_length) == 1 and not self._prefill:
            return [_DecodeGroup(list(decode_tokens), None)]
        return [
            _DecodeGroup(rows, torch.tensor([decode_tokens[row] for row in rows], device=self._device))
            for rows in by_length.values()
        ]

    def attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        if cache.has_pages and self._in_pages is not None:
            return self._in_pages.attend(q_THK, k_TJK, v_TJK, cache, spec)
        # Attend to keys and values as they are stored, so that no answer depends on how a prompt was cut into steps.
        return self._attend_stored(q_THK, *cache.write(self._batch.slots, k_TJK, v_TJK), cache, spec)

    def attend_shared(self, q_THK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        if cache.has_pages and self._in_pages is not None:
            return self._in_pages.attend_shared(q_THK, cache, spec)
        stored, slots = ((cache.k_NJK, "new k"), (cache.v_NJK, "new v")), self._batch.slots
        new = [self._backend.gather(store, slots, q_THK.dtype, purpose) for store, purpose in stored]
        return self._attend_stored(q_THK, new[0], new[1], cache, spec)

    def _attend_stored(
        self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec
    ) -> Tensor:
        """Attend over a cache that has the keys and values of the step's tokens already."""
        stores = cache.k_NJK, cache.v_NJK
        if self._cpu_decode is not None and self._decodes_on_cpu(k_TJK, cache, spec):
            return self._cpu_decode.attend(q_THK, k_TJK, cache, spec.scale)
        if self._is_plain_decode():
            return self._attend_decode(self._decode[0], q_THK, stores, spec)
        out_THK = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
        for group in self._decode:
            assert group.tokens is not None
            out_RHK = self._attend_decode(group, q_THK.index_select(0, group.tokens), stores, spec)
            out_THK.index_copy_(0, group.tokens, out_RHK)
        for row in self._prefill:
            new = slice(row.start, row.end)
            out_THK[new] = self._attend_prefill(row, q_THK[new], (k_TJK[new], v_TJK[new]), stores, spec)
        return out_THK

    def _attend_decode(
        self, group: _DecodeGroup, q_RHK: Tensor, stores: tuple[Tensor, Tensor], spec: AttentionSpec
    ) -> Tensor:
        view = self._view_of(group, spec.sight, q_RHK.dtype)
        if (seen := self._seen_by_kernel(view, q_RHK, stores, spec)) is not None:
            return cpu_layers.attend(q_RHK, *stores, seen, spec.scale)
        rows, num_q, dim = q_RHK.shape
        num_kv = stores[0].shape[1]
        k_SJK, v_SJK = self._gather(stores, view, q_RHK.dtype)
        k_RJSK, v_RJSK = (x.view(rows, -1, num_kv, dim).transpose(1, 2) for x in (k_SJK, v_SJK))
        q_RJGK = q_RHK.reshape(rows, num_kv, num_q // num_kv, dim)
        sinks = None if spec.sinks is None else spec.sinks.view(num_kv, -1, 1)
        out_RJGK = attend(q_RJGK, k_RJSK, v_RJSK, view.mask, False, spec, sinks)
        return out_RJGK.reshape(rows, num_q, dim)

    def _seen_by_kernel(
        self, view: _View, q_RHK: Tensor, stores: tuple[Tensor, Tensor], spec: AttentionSpec
    ) -> cpu_layers.Seen | None:
        """Return the slots as the CPU's kernel takes them; None if it cannot attend to them, or there is none."""
        is_plain = not spec.softcap and spec.sinks is None
        if not is_plain or view.slots is None or view.counts_R is None or not cpu_layers.takes_heads(q_RHK):
            return None
        k_NJK, v_NJK = stores
        if k_NJK.dtype != torch.bfloat16 or k_NJK.shape != v_NJK.shape or q_RHK.shape[2] != k_NJK.shape[2]:
            return None
        if not (k_NJK.is_contiguous() and v_NJK.is_contiguous()):
            return None
        return cpu_layers.Seen(view.slots.view(len(q_RHK), -1), view.counts_R)

    def _gather(self, stores: tuple[Tensor, Tensor], view: _View, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        slots = view.slots
        assert slots is not None
        if view.run is not None and stores[0].dtype == dtype:
            return stores[0][view.run], stores[1][view.run]
        if stores[0] is stores[1]:
            latents_SJK = self._backend.gather(stores[0], slots, dtype, "k")
            return latents_SJK, latents_SJK
        k_SJK, v_SJK = (
            self._backend.gather(store, slots, dtype, kind) for store, kind in zip(stores, "kv", strict=True)
        )
        return k_SJK, v_SJK

    def _view_of(self, group: _DecodeGroup, sight: Sight, dtype: torch.dtype) -> _View:
        if sight not in group.views:
            group.views[sight] = self._decode_view(group, sight, dtype)
        return group.views[sight]

    def _decode_view(self, group: _DecodeGroup, sight: Sight, dtype: torch.dtype) -> _View:
        lens = [self._batch.context_lens_host[row] for row in group.rows]
        seen = [count - first_key(count - 1, sight) for count in lens]
        tables_RB = self._batch.block_tables
        if group.tokens is not None:
            tables_RB = tables_RB[torch.tensor(group.rows, device=self._device)]
        ends_R1 = torch.tensor(lens, device=self._device).unsqueeze(1)
        starts_R1 = ends_R1 - torch.tensor(seen, device=self._device).unsqueeze(1)
        places_RS = starts_R1 + torch.arange(max(seen), device=self._device)
        slots_RS = self._slots(places_RS.minimum(ends_R1 - 1), tables_RB)
        counts_R = torch.tensor(seen, device=self._device)
        if min(seen) == max(seen):
            return _View(slots_RS.flatten(), None, counts_R, _run(slots_RS))
        mask_RS = torch.zeros(places_RS.shape, dtype=dtype, device=self._device)
        mask_RS.masked_fill_(places_RS >= ends_R1, -torch.inf)
        return _View(slots_RS.flatten(), mask_RS[:, None, None, :], counts_R)

    def _attend_prefill(
        self,
        row: _PrefillRow,
        q_QHK: Tensor,
        new: tuple[Tensor, Tensor],
        stores: tuple[Tensor, Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        if spec.sight not in row.views:
            row.views[spec.sight] = self._prefill_view(row, spec.sight)
        view = row.views[spec.sight]
        k_SJK, v_SJK = new
        if view.slots is not None:
            k_SJK, v_SJK = self._gather(stores, view, q_QHK.dtype)
        num_kv = k_SJK.shape[1]
        groups = q_QHK.shape[1] // num_kv
        q_JGQK = q_QHK.view(len(q_QHK), num_kv, groups, -1).permute(1, 2, 0, 3)
        k_JGSK = k_SJK.transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)
        v_JGSK = v_SJK.transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)
        sinks = None if spec.sinks is None else spec.sinks.view(num_kv, groups, 1, 1)
        out_JGQK = attend(q_JGQK, k_JGSK, v_JGSK, view.mask, view.mask is None, spec, sinks)
        return out_JGQK.permute(2, 0, 1, 3).reshape(q_QHK.shape)

    def _prefill_view(self, row: _PrefillRow, sight: Sight) -> _View:
        first_query, (window, in_chunks) = row.context_len - (row.end - row.start), sight
        if first_query == 0 and (window is None or row.context_len <= window):
            return _View(None, None)
        keys_1S = torch.arange(first_key(first_query, sight), row.context_len, device=self._device).unsqueeze(0)
        queries_Q1 = torch.arange(first_query, row.context_len, device=self._device).unsqueeze(1)
        mask_QS = keys_1S <= queries_Q1
        if window is not None:
            mask_QS &= keys_1S >= queries_Q1 // window * window if in_chunks else keys_1S > queries_Q1 - window
        if first_query == 0:
            return _View(None, mask_QS)
        table_1B = self._batch.block_tables[row.row : row.row + 1]
        slots_1S = self._slots(keys_1S, table_1B)
        return _View(slots_1S.flatten(), mask_QS, run=_run(slots_1S))

    def _slots(self, places_RS: Tensor, tables_RB: Tensor) -> Tensor:
        """Return the slots of the cache for positions in each row's context."""
        blocks_RS = tables_RB.long().gather(1, places_RS // self._block_size)
        return blocks_RS * self._block_size + places_RS % self._block_size


def _run(slots_RS: Tensor) -> slice | None:
    """Return the slots of a single row on the CPU if they follow one another. A GPU would have to be waited for."""
    if len(slots_RS) != 1 or slots_RS.device.type != "cpu":
        return None
    first, count = int(slots_RS[0, 0]), slots_RS.shape[1]
    follows = torch.equal(slots_RS[0], torch.arange(first, first + count))
    return slice(first, first + count) if follows else None
