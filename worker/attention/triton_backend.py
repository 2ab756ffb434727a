"""Attention by Triton kernels.

If all rows of a step decode, one kernel does everything. Otherwise one kernel rotates and writes the cache, one serves
the rows that decode, and one the others. Attention to latents has kernels of its own: for single tokens, and for
prompts so long that keys and values are worth their projection.

The scheduler plans decoding before prefill, so the rows with one new token come first. A row of one token behind a
longer one is left to the prefill kernel, which takes any length.
"""

# T tokens, R rows, H query heads, A = H + 2 J packed heads, K head dim, P pages or positions

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypedDict

import torch
from torch import Tensor

from mgpu.worker.attention.interface import AttentionSpec
from mgpu.worker.kernels.attention.decode import decode_attention
from mgpu.worker.kernels.attention.inputs import LatentProjections, LatentRows, NewLatents, PackedHeads, PagedCache
from mgpu.worker.kernels.attention.latent import latent_attention
from mgpu.worker.kernels.attention.latent_cache import store_latents
from mgpu.worker.kernels.attention.latent_heads import absorb, values
from mgpu.worker.kernels.attention.latent_prefill import PromptRows, latent_prefill, plan_pieces
from mgpu.worker.kernels.attention.prefill import prefill_attention
from mgpu.worker.kernels.attention.rope_cache import rope_and_cache
from mgpu.worker.kernels.linear.inputs import StateRows, StepStates, owners_of
from mgpu.worker.kernels.use import aligned
from mgpu.worker.state.batch import StepBatch, StepRows
from mgpu.worker.state.kv_cache import LayerCache

EXPANDED_BYTES = 256 << 20
"""Memory for keys and values that are projected from latents, at once."""
LEAST_QUERIES = 64
"""Fewest new tokens for which a context's keys and values are projected from latents (see docs/kernels.md)."""


class _Reach(TypedDict):
    scale: float
    window: int | None
    in_chunks: bool
    sinks_H: Tensor | None


def _reach(spec: AttentionSpec) -> _Reach:
    """Return what kernels take of a layer's constants."""
    return {"scale": spec.scale, "window": spec.window, "in_chunks": spec.in_chunks, "sinks_H": spec.sinks}


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows that one kernel serves, at addresses that are multiples of 16."""

    tables_RP: Tensor
    """int32."""
    lens_R: Tensor
    """int32; 0: the row is left out."""
    starts: Tensor | None = None
    """int32 [R + 1]: the rows' queries; None: row r has token r."""
    owners_T: Tensor | None = None
    """int32: which row each token of the step is of, -1: none. With ``starts``, for attention to latents."""

    def of(self, cache: LayerCache) -> PagedCache:
        """Return these rows of one layer's cache, as kernels take them."""
        return PagedCache(cache.k_NBJK, cache.v_NBJK, self.tables_RP, self.lens_R)


class TritonBackend:
    """Keeps nothing between steps: kernels keep their scratch themselves, one per device."""

    takes_packed = True

    def __init__(self, has_states: bool = False, expanded_bytes: int = 0) -> None:
        """``expanded_bytes``: of a token's keys and values as projected from its latent; 0: there are no latents."""
        self.has_states = has_states
        self._has_owners = has_states or expanded_bytes > 0
        self._expanded_bytes = expanded_bytes

    def begin_step(self, batch: StepBatch, block_size: int) -> "TritonStep":
        in_pages = batch.for_pages()
        if in_pages is None:
            return self._step(batch, block_size)
        return replace(self._step(batch, block_size), in_pages=self._step(in_pages, block_size))

    def _step(self, batch: StepBatch, block_size: int) -> "TritonStep":
        decoding = sum(1 for _ in takewhile(lambda count: count == 1, batch.query_lens_host))
        tables, lens = batch.block_tables, batch.context_lens
        decode = PagedRows(aligned(tables[:decoding]), aligned(lens[:decoding])) if decoding else None
        prompts, states = None, StepStates(None, None) if self.has_states else None
        if decode is not None and states is not None:
            states = states._replace(decode=StateRows(aligned(batch.rows[:decoding]), decode.lens_R))
        if decoding < len(batch.query_lens_host):
            starts = aligned(batch.query_starts[decoding:])
            owners_T = owners_of(starts, len(batch.positions)) if self._has_owners else None
            prompts = PagedRows(aligned(tables[decoding:]), aligned(lens[decoding:]), starts, owners_T)
            if states is not None:
                rows = StateRows(aligned(batch.rows[decoding:]), prompts.lens_R, starts, owners_T)
                states = states._replace(prompts=rows)
        latents = self._latent_prompts(batch, prompts, decoding, block_size)
        where = aligned(batch.positions), aligned(batch.slots)
        return TritonStep(*where, decode, prompts, batch.step_rows, states, latents)

    def _latent_prompts(
        self, batch: StepBatch, prompts: "PagedRows | None", decoding: int, block_size: int
    ) -> PromptRows | None:
        """Return the rows with prompts if their keys and values are worth a projection."""
        if prompts is None or prompts.starts is None or not self._expanded_bytes:
            return None
        contexts, counts = batch.context_lens_host[decoding:], batch.query_lens_host[decoding:]
        pairs = sum(count * context for count, context in zip(counts, contexts, strict=True))
        if pairs < LEAST_QUERIES * sum(contexts):
            return None
        most = EXPANDED_BYTES // self._expanded_bytes
        return PromptRows(prompts.lens_R, prompts.starts, plan_pieces(prompts.tables_RP, contexts, block_size, most))


@dataclass(frozen=True, slots=True)
class TritonStep:
    """One step. Rows that decode have the first tokens, the others the tokens after them."""

    positions_T: Tensor
    slots_T: Tensor
    decode: PagedRows | None
    prompts: PagedRows | None
    rows: StepRows | None
    """None in CUDA graphs."""
    states: StepStates | None = None
    latent_prompts: PromptRows | None = None
    """Prompts whose keys and values are projected from latents; None: they attend to latents as rows that decode do."""
    in_pages: "TritonStep | None" = None
    """The step in layers that keep blocks in sight only."""

    @property
    def packed(self) -> "TritonStep":
        return self

    def attend_packed(
        self, qkv_TAK: Tensor, scale_T: Tensor | None, table_PK: Tensor, cache: LayerCache, spec: AttentionSpec
    ) -> Tensor:
        if cache.has_pages and self.in_pages is not None:
            return self.in_pages.attend_packed(qkv_TAK, scale_T, table_PK, cache, spec)
        norms = (spec.norms.q_weight, spec.norms.k_weight, spec.norms.eps) if spec.norms is not None else ()
        heads = PackedHeads(qkv_TAK, table_PK, scale_T, *norms)
        if self.decode is not None and self.prompts is None:
            return decode_attention(heads, self.decode.of(cache), **_reach(spec))
        q_THK = rope_and_cache(heads, self.positions_T, self.slots_T, cache.k_NBJK, cache.v_NBJK)
        return self._attend_queries(q_THK, cache, spec)

    def attend_shared_packed(
        self, q_THK: Tensor, scale_T: Tensor | None, table_PK: Tensor, cache: LayerCache, spec: AttentionSpec
    ) -> Tensor:
        if cache.has_pages and self.in_pages is not None:
            return self.in_pages.attend_shared_packed(q_THK, scale_T, table_PK, cache, spec)
        # The kernel that rotates takes keys and values too: zeros, which slot -1 keeps out of the cache.
        tokens, _, dim = q_THK.shape
        heads_TAK = torch.cat((q_THK, q_THK.new_zeros(tokens, 2 * cache.k_NBJK.shape[2], dim)), dim=1)
        norms = (spec.norms.q_weight, spec.norms.k_weight, spec.norms.eps) if spec.norms is not None else ()
        heads, nowhere_T = PackedHeads(heads_TAK, table_PK, scale_T, *norms), torch.full_like(self.slots_T, -1)
        q_THK = rope_and_cache(heads, self.positions_T, nowhere_T, cache.k_NBJK, cache.v_NBJK)
        return self._attend_queries(q_THK, cache, spec)

    def _attend_queries(self, q_THK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        """Attend from rotated queries over a cache that has the step's tokens already."""
        out_THK = torch.empty_like(q_THK)
        if self.decode is not None:
            count = len(self.decode.lens_R)
            rows, out_RHK = self.decode.of(cache), out_THK[:count]
            decode_attention(q_THK[:count], rows, **_reach(spec), out_RHK=out_RHK)
        if self.prompts is not None:
            assert self.prompts.starts is not None
            rows, starts = self.prompts.of(cache), self.prompts.starts
            prefill_attention(q_THK, rows, starts, **_reach(spec), out_THK=out_THK)
        return out_THK

    @property
    def latents(self) -> "TritonStep":
        return self

    def attend_latents(
        self, heads: LatentProjections, new: NewLatents, table_PK: Tensor, cache: LayerCache, spec: AttentionSpec
    ) -> Tensor:
        latents = cache.k_NBJK[:, :, 0]
        where = table_PK, self.positions_T, self.slots_T, latents
        if self.latent_prompts is None:
            rotated_THK, wide_THC = store_latents(new, *where, heads)
            return self._attend_absorbed(heads, wide_THC, rotated_THK, latents, spec.scale)
        rotated_THK, _ = store_latents(new, *where)
        out_THV = heads.q_THP.new_zeros(*heads.q_THP.shape[:2], heads.value_dim)
        if self.decode is not None:
            count = len(self.decode.lens_R)
            decoding, step = heads._replace(q_THP=heads.q_THP[:count]), replace(self, prompts=None)
            out_THV[:count] = step._attend_absorbed(decoding, None, rotated_THK[:count], latents, spec.scale)
        latent_prefill(heads, rotated_THK, latents, self.latent_prompts, scale=spec.scale, out_THV=out_THV)
        return out_THV

    def _attend_absorbed(
        self, heads: LatentProjections, wide_THC: Tensor | None, rotated_THK: Tensor, latents: Tensor, scale: float
    ) -> Tensor:
        """Attend to latents themselves: queries are brought to their width, and sums of them to that of values."""
        q_THC = absorb(heads.q_THP, heads.weight_HXC) if wide_THC is None else wide_THC
        # Tokens that only pad a step with prompts get zeros: what is undefined could be anything to the layers behind.
        make = torch.empty if self.prompts is None else torch.zeros
        out_THC = make(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
        if self.decode is not None:
            count = len(self.decode.lens_R)
            rows, queries = LatentRows(self.decode.tables_RP, self.decode.lens_R), (q_THC[:count], rotated_THK[:count])
            latent_attention(*queries, latents, rows, scale=scale, out_THC=out_THC[:count])
        if self.prompts is not None:
            rows = LatentRows(self.prompts.tables_RP, self.positions_T, self.prompts.owners_T)
            latent_attention(q_THC, rotated_THK, latents, rows, scale=scale, out_THC=out_THC)
        return values(out_THC, heads.weight_HXC, heads.plain)

    def attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        raise NotImplementedError("layers pass the packed product to kernels")

    def attend_shared(self, q_THK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        raise NotImplementedError("layers pass the product of queries to kernels")
