"""Attention over the paged KV cache: what a backend is, and the choice of one.

A backend prepares a step once, and what it gives is called by every layer of that step. A faster backend is plugged in
at `select_backend`; the reference one, in plain torch, is what others are tested against.
"""

# T tokens, H query heads of this rank, J KV heads of this rank, K head dim

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mgpu.protocol.model.facts import KvCacheDtype
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import LayerCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is constant in one layer. ``window``: a token sees itself and the ``window - 1`` before it; None: all."""

    scale: float
    window: int | None


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each query and key head before rotation (Qwen3, Gemma 3); weights [K]."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a backend must support: heads of this rank, and the windows that layers have."""

    num_q: int
    num_kv: int
    head_dim: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]
    kv_cache_dtype: KvCacheDtype = "auto"


class PackedAttention(Protocol):
    """Attention that starts from the packed product of queries, keys and values, as fused kernels do."""

    def attend_packed(
        self,
        qkv_TAK: Tensor,
        scale_T: Tensor | None,
        table_PK: Tensor,
        norms: HeadNorms | None,
        cache: LayerCache,
        spec: AttentionSpec,
    ) -> Tensor:
        """Multiply by the tokens' scales, normalize and rotate by the table of all positions, write keys and values,
        give the output [T, H, K]."""
        ...


class StepAttention(Protocol):
    """Attention of one step, for all of its layers."""

    @property
    def packed(self) -> PackedAttention | None:
        """The fused way, where the backend has one; then `attend` is not used."""
        ...

    def attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        """Write the new keys and values to their slots, then give the attention output [T, H, K]."""
        ...


class AttentionBackend(Protocol):
    """One worker's way to compute attention; may keep buffers between steps."""

    @property
    def takes_packed(self) -> bool:
        """Whether its steps have a fused way; layers are then given tables of angles."""
        ...

    def begin_step(self, batch: StepBatch, block_size: int) -> StepAttention:
        """Prepare what the layers of a step share.

        Entries of the cache that no token of the step can see may be NaN, and must not reach the output.
        """
        ...


def select_backend(device: torch.device, shape: AttentionShape) -> AttentionBackend:
    """Choose the attention of a worker, once: kernels where they pass a check against plain torch."""
    if uses_kernels(device):
        from mgpu.worker.attention.check import attention_problem
        from mgpu.worker.attention.triton_backend import TritonBackend

        problem = attention_problem(device, shape)
        if problem is None:
            return TritonBackend()
        log.warning("attention runs on plain torch, many times slower: %s", problem)
    from mgpu.worker.attention.plain_backend import ReferenceBackend

    return ReferenceBackend()
