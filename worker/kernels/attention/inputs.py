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
