"""Paged storage of keys and values.

A block holds ``block_size`` consecutive tokens of one request; slot ``block * block_size + offset`` is one token. The
orchestrator decides which block belongs to whom; here is only the memory.
"""

# N blocks, B tokens per block, J KV heads of this rank, K head dim

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [N, B, J, K] each. Entries that were never written are arbitrary, even NaN."""

    def __init__(self, k_NBJK: Tensor, v_NBJK: Tensor) -> None:
        self.k_NBJK = k_NBJK
        self.v_NBJK = v_NBJK
        self.k_NJK = k_NBJK.flatten(0, 1)
        """The same memory by slots, [N * B, J, K]."""
        self.v_NJK = v_NBJK.flatten(0, 1)


class KvCache:
    """The pool of one rank: a `LayerCache` per layer of its stage, in layer order."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(num_layers)
        ]


def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Give the memory that one block takes on a rank, keys and values of all its layers together."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
