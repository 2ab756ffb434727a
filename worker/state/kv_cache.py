"""Paged storage of keys and values, and beside it the states of layers that have no keys and values.

A block holds ``block_size`` consecutive tokens of one request; slot ``block * block_size + offset`` is one token. The
orchestrator decides which request a block belongs to.
"""

# N blocks, B tokens per block, J KV heads of this rank, K head dim

from collections.abc import Sequence

import torch
from torch import Tensor

from mgpu.protocol.model.facts import KvCacheDtype, ModelFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.worker.state.recurrent import LayerStates, StatePool

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class LayerCache:
    """Keys and values of one layer, [N, B, J, K] each. Entries that were never written are arbitrary and may be NaN.

    With latent attention both are the same tensor: the values are the first components of the keys. A linear layer has
    none of them (N is 0), and ``states`` instead.
    """

    def __init__(self, k_NBJK: Tensor, v_NBJK: Tensor, states: LayerStates | None = None) -> None:
        self.states = states
        self.has_pages = False
        """True if it keeps blocks in sight only, each in a page (`RowTable.pages`). Then N counts pages."""
        self.k_NBJK = k_NBJK
        self.v_NBJK = v_NBJK
        self.k_NJK = k_NBJK.flatten(0, 1)
        """The same memory by slots, [N * B, J, K]."""
        self.v_NJK = self.k_NJK if v_NBJK is k_NBJK else v_NBJK.flatten(0, 1)

    def write(self, slots_T: Tensor, k_TJK: Tensor, v_TJK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; return their keys and values as rounded by the cache, in their own dtype."""
        if self.v_NJK is self.k_NJK:
            stored_TJK = _write(self.k_NJK, slots_T, k_TJK)
            return stored_TJK, stored_TJK
        return _write(self.k_NJK, slots_T, k_TJK), _write(self.v_NJK, slots_T, v_TJK)


def _write(store_NJK: Tensor, slots_T: Tensor, new_TJK: Tensor) -> Tensor:
    if store_NJK.dtype == new_TJK.dtype:
        store_NJK.index_copy_(0, slots_T, new_TJK)
        return new_TJK
    stored_TJK = to_stored(new_TJK, store_NJK.dtype)
    # As bytes: torch has no index_copy_ of float8.
    store_NJK.view(torch.uint8).index_copy_(0, slots_T, stored_TJK.view(torch.uint8))
    return stored_TJK.to(new_TJK.dtype)


def stored_dtype(kept: KvCacheDtype, dtype: torch.dtype) -> torch.dtype:
    """Return the type that a cache has if layers compute in ``dtype``."""
    return FP8 if kept == "fp8" else dtype


def to_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the type of a cache. Float8 saturates: the plain conversion may make NaN of large values."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8) if dtype == FP8 else x.to(dtype)


def widen(stored: Tensor, out: Tensor) -> Tensor:
    """Write float8 values into ``out``, of any wider type: on the CPU eight times as fast as torch's own conversion.

    The bits of e4m3, put in the place of float16's, are the value divided by 256. NaN becomes 480.
    """
    bits = stored.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    bits &= -1 - (1 << 14)  # widening copies the sign into a bit of float16's exponent
    return out.copy_(bits.view(torch.float16)).mul_(256.0)


class KvCache:
    """The pool of one rank: a `LayerCache` for each layer of its stage, in order."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        is_latent: bool = False,
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.states: StatePool | None = None
        """Of linear layers, if there are any."""
        self.layers: list[LayerCache] = []
        for _ in range(num_layers):
            keys = torch.empty(shape, dtype=dtype, device=device)
            self.layers.append(LayerCache(keys, keys if is_latent else torch.empty_like(keys)))

    @classmethod
    def of_layers(
        cls,
        facts: ModelFacts,
        layers: Sequence[int],
        part: TensorPart,
        sizes: tuple[int, int, int],
        types: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        num_pages: int = 0,
    ) -> "KvCache":
        """Allocate what some layers of a model need on a rank.

        ``sizes``: blocks, tokens of a block, and rows that have states. ``types``: of activations, and of keys and
        values. ``num_pages``: blocks that window layers keep; 0: all.
        """
        num_blocks, block_size, num_states = sizes
        cache, is_latent = cls(0, num_blocks, block_size, 1, facts.head_dim, types[1], device), facts.latent is not None
        are_linear = [facts.is_linear(layer) for layer in layers]
        for layer, is_linear in zip(layers, are_linear, strict=True):
            if (source := facts.cache_source(layer)) != layer:
                cache.layers.append(cache.layers[layers.index(source)])
                continue
            has_pages = num_pages > 0 and facts.sliding_layers[layer]
            blocks = 0 if is_linear else num_pages if has_pages else num_blocks
            shape = block_size, *heads_of(facts, layer, part), types[1], device
            cache.layers += cls(1, blocks, *shape, is_latent).layers
            cache.layers[-1].has_pages = has_pages
        if facts.linear is not None and any(are_linear):
            pool = StatePool(facts.linear, sum(are_linear), part.size, num_states, types[0], device)
            cache.states = pool
            linear = [each for each, is_linear in zip(cache.layers, are_linear, strict=True) if is_linear]
            for place, each in enumerate(linear):
                each.states = pool.layer(place)
        return cache

    def copy_states(self, sources: list[int], targets: list[int]) -> None:
        """Copy what linear layers keep of some rows to others."""
        if sources and self.states is not None:
            self.states.copy(sources, targets)


def heads_of(facts: ModelFacts, layer: int, part: TensorPart) -> tuple[int, int]:
    """Return the KV heads of a layer on a rank, and the size of one."""
    own = facts.of_layer(layer)
    return part.heads(own.num_q_heads, own.num_kv_heads).num_kv, own.head_dim


def block_bytes(facts: ModelFacts, layers: Sequence[int], part: TensorPart, block_size: int, dtype: torch.dtype) -> int:
    """Return the memory of one block on a rank: what some layers cache together. Linear ones cache nothing."""
    own = [facts.of_layer(layer) for layer in layers if not facts.is_linear(layer)]
    own = [each for each in own if each.has_own_keys]
    held = [part.heads(each.num_q_heads, each.num_kv_heads).num_kv * each.cached_values for each in own]
    return sum(held) * block_size * dtype.itemsize
