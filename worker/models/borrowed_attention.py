"""mgpu's attention over the paged cache, called by transformers' modelling code as its attention function.

The library rotates heads itself. Kernels that take packed heads get them with a table of angles that turns nothing.
"""

# T tokens, H query heads of this rank, J KV heads of this rank, A = H + 2 J packed heads, K head dim, P positions

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgpu.worker.attention.interface import AttentionSpec, StepAttention
from mgpu.worker.state.kv_cache import KvCache

IMPLEMENTATION = "mgpu"
"""Its name in the library's table. There is no mask function of this name, so the library makes no masks."""


class CurrentStep:
    """The step that a stage runs. Its attention modules have a reference to it, and to the place of their layer."""

    def __init__(self, layers: range) -> None:
        self._layers = layers
        self.attention: StepAttention | None = None
        self.cache: KvCache | None = None
        self.num_positions = 0
        self._still_PK = torch.empty((0, 0))

    def still_table(self, positions: int, head_dim: int, device: torch.device) -> Tensor:
        """Return the table of angles 0, float32 [P, K]. Kept while it is long enough."""
        if len(self._still_PK) < positions:
            halves_K = torch.ones(head_dim, device=device)
            halves_K[head_dim // 2 :] = 0.0  # cos, then sin
            self._still_PK = halves_K.repeat(positions, 1)
        return self._still_PK

    def attach(self, base: Any) -> None:
        """Tell the attention modules of all layers where they are."""
        for place, index in enumerate(self._layers):
            for module in base.layers[index].modules():
                module.mgpu_layer = LayerPlace(self, place)

    @contextmanager
    def running(self, attention: StepAttention, cache: KvCache, num_positions: int) -> Iterator[None]:
        """Let attention modules use these; no position is ``num_positions`` or above."""
        self.attention, self.cache, self.num_positions = attention, cache, num_positions
        try:
            yield
        finally:
            self.attention, self.cache = None, None


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """A layer of a stage: its cache is the one at ``place``."""

    step: CurrentStep
    place: int


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Return the output [1, T, H, K] of queries [1, H, T, K] over the cache and new keys and values [1, J, T, K]."""
    at = module.mgpu_layer
    assert isinstance(at, LayerPlace)
    assert at.step.attention is not None
    assert at.step.cache is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    spec = AttentionSpec(scale, sliding_window, softcap=softcap or 0.0, sinks=s_aux)
    heads, layer = [each[0].transpose(0, 1) for each in (query, key, value)], at.step.cache.layers[at.place]
    packed = at.step.attention.packed
    if packed is None:
        q_THK, k_TJK, v_TJK = (each.contiguous() for each in heads)
        return at.step.attention.attend(q_THK, k_TJK, v_TJK, layer, spec).unsqueeze(0), None
    assert not softcap, "kernels have no capped scores"
    assert s_aux is None, "kernels have no sinks"
    table_PK = at.step.still_table(at.step.num_positions, query.shape[-1], query.device)
    out_THK = packed.attend_packed(torch.cat(heads, dim=1), None, table_PK, layer, spec)
    return out_THK.unsqueeze(0), None


def register() -> None:
    """Let the library call `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
