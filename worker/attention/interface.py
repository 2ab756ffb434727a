"""Attention over the paged KV cache: the interface of a backend. `choose` selects one; this module imports none.

A backend prepares each step once, and every layer of that step calls what it prepared. The plain backend, in torch, is
what the others are tested against.
"""

# T tokens, H query heads of this rank, A packed heads (query, key, value), K head dim, P positions

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mgpu.protocol.model.attention_facts import LatentFacts, LinearFacts, Sight
from mgpu.protocol.model.facts import KvCacheDtype
from mgpu.worker.kernels.attention.inputs import LatentProjections, NewLatents
from mgpu.worker.kernels.linear.inputs import StepStates
from mgpu.worker.state.batch import StepBatch, StepRows
from mgpu.worker.state.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each query and key head before rotation (Qwen3, Gemma 3); weights [K]."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is constant in one layer."""

    scale: float
    window: int | None
    """A token sees itself and the ``window - 1`` tokens before it; None: all."""
    norms: HeadNorms | None = None
    """Applied by `PackedAttention` only; `StepAttention.attend` takes heads that are normalized already."""
    softcap: float = 0.0
    """Scores become ``cap * tanh(score / cap)``; 0: they stay. Plain attention only."""
    sinks: Tensor | None = None
    """[H]: a score of each query head beside those of its context."""
    in_chunks: bool = False
    """Positions are cut into chunks of ``window``, and a token sees itself and what is before it in its chunk."""

    @property
    def sight(self) -> Sight:
        """Return what decides which keys a token sees."""
        return self.window, self.in_chunks


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a backend must support: heads of this rank, and the windows of its layers."""

    num_q: int
    num_kv: int
    head_dim: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]
    kv_cache_dtype: KvCacheDtype = "auto"
    has_plain_scores: bool = True
    """False if scores are capped."""
    linear: LinearFacts | None = None
    """The linear layers of the stage, if it has any."""
    wide: "AttentionShape | None" = None
    """That of the layers whose heads have sizes of their own (Gemma 4's full attention), if there are any."""
    latent: LatentFacts | None = None
    """Set for attention to latents, which are keys and values at once."""
    has_sinks: bool = False
    in_chunks: bool = False
    """The windows are chunks; see `AttentionSpec`."""

    @property
    def expanded_bytes(self) -> int:
        """Return the bytes of a token's keys and values if they are projected from its latent; 0: there are none."""
        if self.latent is None:
            return 0
        return self.num_q * (self.latent.plain + self.latent.value_dim) * self.dtype.itemsize


class PackedAttention(Protocol):
    """Attention that starts from the packed product of queries, keys and values, as fused kernels do."""

    def attend_packed(
        self, qkv_TAK: Tensor, scale_T: Tensor | None, table_PK: Tensor, cache: LayerCache, spec: AttentionSpec
    ) -> Tensor:
        """Return the attention output [T, H, K] and write the new keys and values to their slots.

        Heads are multiplied by their token's scale, normalized, and rotated by the table of all positions.
        """
        ...

    def attend_shared_packed(
        self, q_THK: Tensor, scale_T: Tensor | None, table_PK: Tensor, cache: LayerCache, spec: AttentionSpec
    ) -> Tensor:
        """Return the attention output of queries alone: an earlier layer has written the step's keys and values."""
        ...


class LatentAttentionKernels(Protocol):
    """Attention to latents, as kernels compute it."""

    def attend_latents(
        self, heads: LatentProjections, new: NewLatents, table_PK: Tensor, cache: LayerCache, spec: AttentionSpec
    ) -> Tensor:
        """Return the values [T, H, V] that queries attend to, and write the new latents to their slots.

        The rotated components of queries are in ``new``.
        """
        ...


class StepAttention(Protocol):
    """Attention of one step, for all of its layers."""

    @property
    def rows(self) -> StepRows | None:
        """The rows of the step, for layers that have states. None in CUDA graphs."""
        ...

    @property
    def positions_T(self) -> Tensor:
        """The position of each token of the step in its request."""
        ...

    @property
    def states(self) -> StepStates | None:
        """The rows as kernels of linear layers take them; None: those layers run on plain torch."""
        ...

    @property
    def packed(self) -> PackedAttention | None:
        """The fused form, if the backend has one; layers then do not call `attend`."""
        ...

    @property
    def latents(self) -> LatentAttentionKernels | None:
        """The form for latents, if the backend has one; layers of latent attention then do not call `attend`."""
        ...

    def attend(self, q_THK: Tensor, k_TJK: Tensor, v_TJK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        """Write the new keys and values to their slots, then return the attention output [T, H, K]."""
        ...

    def attend_shared(self, q_THK: Tensor, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        """Return the attention output over a cache to which an earlier layer has written the step's tokens."""
        ...


class AttentionBackend(Protocol):
    """One worker's way to compute attention; may keep buffers between steps."""

    @property
    def takes_packed(self) -> bool:
        """True if its steps have a fused form; layers then get tables of angles."""
        ...

    @property
    def has_states(self) -> bool:
        """True if kernels compute linear layers."""
        ...

    def begin_step(self, batch: StepBatch, block_size: int) -> StepAttention:
        """Prepare the state that the layers of a step share.

        Entries of the cache that no token of the step can see may be NaN, and must not reach the output.
        """
        ...
