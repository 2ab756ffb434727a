"""Attention on Triton kernels: one serves a step in which all rows decode.

In other steps one kernel rotates and writes the cache, one serves decoding rows, one the others.

A step's rows come with those of one new token first (the scheduler plans decoding before prefill); rows of one token
behind a longer one are left to the prefill kernel, which takes any length.
"""

# T tokens, R rows, H query heads, A = H + 2 J packed heads, K head dim, P pages or positions

from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from mgpu.worker.attention.interface import AttentionSpec, HeadNorms
from mgpu.worker.kernels.attention.decode import decode_attention, decode_attention_packed
from mgpu.worker.kernels.attention.prefill import prefill_attention
from mgpu.worker.kernels.attention.rope_cache import rope_and_cache
from mgpu.worker.kernels.use import aligned
from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows that one kernel serves, at addresses that are multiples of 16."""

    tables_RP: Tensor
    """int32."""
    lens_R: Tensor
    """int32; 0: the row is not meant."""
    starts: Tensor | None = None
    """int32 [R + 1]: the rows' queries; None: row r has token r."""


class TritonBackend:
    """Has no state: what kernels share between steps is their scratch, one per device."""

    takes_packed = True

    def begin_step(self, batch: StepBatch, block_size: int) -> "TritonStep":
        del block_size  # the cache's shape says it
        decoding = sum(1 for _ in takewhile(lambda count: count == 1, batch.query_lens_host))
        tables, lens = batch.block_tables, batch.context_lens
        decode = PagedRows(aligned(tables[:decoding]), aligned(lens[:decoding])) if decoding else None
        prompts = None
        if decoding < len(batch.query_lens_host):
            starts = aligned(batch.query_starts[decoding:])
            prompts = PagedRows(aligned(tables[decoding:]), aligned(lens[decoding:]), starts)
        return TritonStep(aligned(batch.positions), aligned(batch.slots), decode, prompts)


class TritonStep:
    """One step. Rows that decode have the first tokens; what prompts have is written after them."""

    def __init__(
        self, positions_T: Tensor, slots_T: Tensor, decode: PagedRows | None, prompts: PagedRows | None
    ) -> None:
        self._positions_T = positions_T
        self._slots_T = slots_T
        self._decode = decode
        self._prompts = prompts

    @property
    def packed(self) -> "TritonStep":
        return self

    def attend_packed(
        self,
        qkv_TAK: Tensor,
        scale_T: Tensor | None,
        table_PK: Tensor,
        norms: HeadNorms | None,
        cache: LayerCache,
        spec: AttentionSpec,
    ) -> Tensor:
        k_NBJK, v_NBJK = cache.k_NBJK, cache.v_NBJK
        if self._decode is not None and self._prompts is None:
            return decode_attention_packed(
                qkv_TAK,
                table_PK,
                k_NBJK,
                v_NBJK,
                self._decode.tables_RP,
                self._decode.lens_R,
                scale=spec.scale,
                window=spec.window,
                norms=norms,
                scale_R=scale_T,
            )
        positions_T, slots_T = self._positions_T, self._slots_T
        q_THK = rope_and_cache(qkv_TAK, table_PK, positions_T, slots_T, k_NBJK, v_NBJK, norms=norms, scale_T=scale_T)
        out_THK = torch.empty_like(q_THK)
        if self._decode is not None:
            count = len(self._decode.lens_R)
            decode_attention(
                q_THK[:count],
                k_NBJK,
                v_NBJK,
                self._decode.tables_RP,
                self._decode.lens_R,
                scale=spec.scale,
                window=spec.window,
                out_RHK=out_THK[:count],
            )
        if self._prompts is not None:
            assert self._prompts.starts is not None
            prefill_attention(
                q_THK,
                k_NBJK,
                v_NBJK,
                self._prompts.tables_RP,
                self._prompts.lens_R,
                self._prompts.starts,
                scale=spec.scale,
                window=spec.window,
                out_THK=out_THK,
            )
        return out_THK

    def attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        raise NotImplementedError("layers give kernels the packed product")
