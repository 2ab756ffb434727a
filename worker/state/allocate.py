"""Allocate a worker's rows and their cache."""

from collections.abc import Sequence

import torch

from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.kv_pools import PoolSize
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.state.kv_cache import KvCache, stored_dtype
from mgpu.worker.state.rows import RowTable


def make_state(
    spec: WorkerSpec, place: RankPlace, device: torch.device, pool: PoolSize, layers: Sequence[int], num_states: int
) -> tuple[RowTable, KvCache]:
    """Allocate the rows, a cache of so large pools for some layers, and so many states of their linear attention."""
    limits = spec.limits
    dtype: torch.dtype = getattr(torch, spec.layout.dtype)
    types = dtype, stored_dtype(spec.layout.kv_cache_dtype, dtype)
    rows = RowTable(limits.max_rows, limits.max_seq_len, limits.block_size, pool.num_blocks, device, pool.num_pages)
    sizes = pool.num_blocks, limits.block_size, num_states
    return rows, KvCache.of_layers(spec.facts, layers, place.part, sizes, types, device, pool.num_pages)
