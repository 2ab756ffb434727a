"""What attention kernels take: a paged cache with the rows of a step, and packed heads. This module needs no Triton."""

# T tokens, A packed heads, R rows, N blocks, B tokens per block, J KV heads, K head dim, P pages or positions

from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
"""Kernels exponentiate with base 2, so scores are multiplied by this."""
UNLIMITED = 1 << 30
"""The window of a layer that has none."""


class PagedCache(NamedTuple):
    """Keys and values of one layer, and the pages that each row of a step has in them.

    Keys and values have equal strides, K contiguous, and the type of the queries; or they are float8_e4m3fn and hold
    values divided by ``k_scale`` and ``v_scale``.
    """

    k_NBJK: Tensor
    v_NBJK: Tensor
    tables_RP: Tensor
    """int32: the blocks of each row."""
    lens_R: Tensor
    """int32: tokens of each row in the cache; 0: the row is left out."""
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def block_size(self) -> int:
        return self.k_NBJK.shape[1]

    @property
    def num_kv(self) -> int:
        return self.k_NBJK.shape[2]

    @property
    def is_fp8(self) -> bool:
        return self.k_NBJK.dtype == torch.float8_e4m3fn


class LatentRows(NamedTuple):
    """Tokens that attend to latents, and the pages that their rows have in the cache."""

    tables_RP: Tensor
    """int32: the blocks of each row."""
    lens: Tensor
    """[R], tokens of each row in the cache, for token r; with ``owners_T`` the position of each token. Integers."""
    owners_T: Tensor | None = None
    """int32: which row each token is of, -1: none."""


def has_latent_kernels(rank: int, rotated: int) -> bool:
    """Return True if kernels take latents of so many components without position, and so many rotated ones."""
    return all(size >= 16 and size & (size - 1) == 0 for size in (rank, rotated))


class NewLatents(NamedTuple):
    """What the projections of latent attention make of new tokens, before it is normalized and rotated."""

    kv_TC: Tensor
    """A latent and its rotated components, contiguous within a token."""
    q_THK: Tensor
    """The rotated components of queries, contiguous within a head."""
    norm_C: Tensor
    """Weight of the norm of latents, which their rotated components have not."""
    eps: float
    is_interleaved: bool
    """True if pairs that are rotated together lie side by side; else they are half of the components apart."""


class LatentProjections(NamedTuple):
    """The plain components of queries, and the projections between latents and the heads of a rank."""

    q_THP: Tensor
    weight_HXC: Tensor
    """Of each head the rows that make keys of latents, then those that make values; contiguous."""

    @property
    def plain(self) -> int:
        return self.q_THP.shape[2]

    @property
    def value_dim(self) -> int:
        return self.weight_HXC.shape[1] - self.plain


class PackedHeads(NamedTuple):
    """The packed product of queries, keys and values, and how its heads become those that attention takes."""

    qkv_TAK: Tensor
    """Query, key, value heads of each token, contiguous within a token."""
    cos_sin_PK: Tensor
    """For each position cos of the K / 2 angles, then sin; contiguous, any float type."""
    scale_T: Tensor | None = None
    """float32: a token's heads are multiplied by its scale first."""
    q_weight: Tensor | None = None
    """[K]: query and key heads are normalized (RMSNorm) before they are rotated; None: they are not."""
    k_weight: Tensor | None = None
    eps: float = 0.0
