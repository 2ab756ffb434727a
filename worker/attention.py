"""Attention over the paged KV cache: what a backend is, and the choice of one.

A backend prepares a step once, and what it gives is called by every layer of that step. A faster backend is plugged in
at `select_backend`; the reference one, in plain torch, is what others are tested against.
"""

# T tokens, H query heads of this rank, J KV heads of this rank, K head dim

from dataclasses import dataclass
from typing import Protocol

import torch
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


class AttentionBackend(Protocol):
    """One worker's way to compute attention; may keep buffers between steps."""

    def begin_step(self, batch: StepBatch, block_size: int) -> StepAttention:
        """Prepare what the layers of a step share.

        Entries of the cache that no token of the step can see may be NaN, and must not reach the output.
        """
        ...


def select_backend(device: torch.device) -> AttentionBackend:
    """Choose the attention of a worker, once."""
    from mgpu.worker.reference_attention import ReferenceBackend

    del device  # one backend so far
    return ReferenceBackend()
