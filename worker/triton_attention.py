"""Attention on Triton kernels: one kernel rotates and writes the cache, one serves decoding rows, one the others.

A step's rows come with those of one new token first (the scheduler plans decoding before prefill); rows of one token
behind a longer one are left to the prefill kernel, which takes any length.
"""

# T tokens, H query heads, A = H + 2 J packed heads, K head dim, P positions

from itertools import takewhile

import torch
from torch import Tensor

from mgpu.worker.attention import AttentionSpec, HeadNorms
from mgpu.worker.batch import StepBatch
from mgpu.worker.kernel_use import aligned
from mgpu.worker.kernels.decode_attention import decode_attention
from mgpu.worker.kernels.prefill_attention import prefill_attention
from mgpu.worker.kernels.rope_cache import rope_and_cache
from mgpu.worker.kv_cache import LayerCache


class TritonBackend:
    """Has no state: what kernels share between steps is their scratch, one per device."""

    takes_packed = True

    def begin_step(self, batch: StepBatch, block_size: int) -> "TritonStep":
        del block_size  # the cache's shape says it
        return TritonStep(batch)


class TritonStep:
    """One step; the tensors of its rows are cut once for all layers."""

    def __init__(self, batch: StepBatch) -> None:
        self._decoding = sum(1 for _ in takewhile(lambda count: count == 1, batch.query_lens_host))
        self._has_prefill = self._decoding < len(batch.query_lens_host)
        self._positions_T = aligned(batch.positions)
        self._slots_T = aligned(batch.slots)
        self._tables_RP = aligned(batch.block_tables)
        self._lens_R = aligned(batch.context_lens)
        if self._has_prefill:
            self._prefill_tables = aligned(batch.block_tables[self._decoding :])
            self._prefill_lens = aligned(batch.context_lens[self._decoding :])
            self._prefill_starts = aligned(batch.query_starts[self._decoding :])

    @property
    def packed(self) -> "TritonStep":
        return self

    def attend_packed(
        self, qkv_TAK: Tensor, table_PK: Tensor, norms: HeadNorms | None, cache: LayerCache, spec: AttentionSpec
    ) -> Tensor:
        k_NBJK, v_NBJK = cache.k_NBJK, cache.v_NBJK
        q_THK = rope_and_cache(qkv_TAK, table_PK, self._positions_T, self._slots_T, k_NBJK, v_NBJK, norms=norms)
        out_THK = torch.empty_like(q_THK)
        if count := self._decoding:
            decode_attention(
                q_THK[:count],
                k_NBJK,
                v_NBJK,
                self._tables_RP[:count],
                self._lens_R[:count],
                scale=spec.scale,
                window=spec.window,
                out_RHK=out_THK[:count],
            )
        if self._has_prefill:
            prefill_attention(
                q_THK,
                k_NBJK,
                v_NBJK,
                self._prefill_tables,
                self._prefill_lens,
                self._prefill_starts,
                scale=spec.scale,
                window=spec.window,
                out_THK=out_THK,
            )
        return out_THK

    def attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        raise NotImplementedError("layers give kernels the packed product")
