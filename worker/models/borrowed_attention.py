"""mgpu's attention over the paged cache, called by transformers' modelling code as its attention function."""

# T tokens, H query heads of this rank, J KV heads of this rank, K head dim

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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

    def attach(self, base: Any) -> None:
        """Tell the attention modules of all layers where they are."""
        for place, index in enumerate(self._layers):
            for module in base.layers[index].modules():
                module.mgpu_layer = LayerPlace(self, place)

    @contextmanager
    def running(self, attention: StepAttention, cache: KvCache) -> Iterator[None]:
        self.attention, self.cache = attention, cache
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
    q_THK, k_TJK, v_TJK = (heads[0].transpose(0, 1).contiguous() for heads in (query, key, value))
    scale = q_THK.shape[-1] ** -0.5 if scaling is None else scaling
    spec = AttentionSpec(scale, sliding_window, softcap=softcap or 0.0, sinks=s_aux)
    out_THK = at.step.attention.attend(q_THK, k_TJK, v_TJK, at.step.cache.layers[at.place], spec)
    return out_THK.unsqueeze(0), None


def register() -> None:
    """Let the library call `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
