"""A Llama layer for a single decoding row on a GPU, with its norms split over the products around them.

A norm of one row is a kernel of a microsecond that everything waits for. Here the product before it adds to the
residual and sums up squares, and the product after it divides: five kernels per layer instead of eight.
"""

# D model dim, K head dim

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from mgpu.worker.attention import StepAttention
from mgpu.worker.kernels.gemv_rows import NormAfter, NormBefore, new_squares
from mgpu.worker.kernels.products import one_row_matmul
from mgpu.worker.kv_cache import KvCache, LayerCache
from mgpu.worker.layers.attention import Attention
from mgpu.worker.layers.linear import Linear
from mgpu.worker.layers.mlp import GatedMLP
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.layers.rotary import Angles


@dataclass(frozen=True, slots=True)
class Squares:
    """Sums of squares of the residual before attention and before the feed-forward network; all layers share them."""

    attention: Tensor
    mlp: Tensor


@dataclass(frozen=True, slots=True)
class HalfNormed:
    """The next layer's input [1, D], times its norm's weight; the residual has it already."""

    x_1D: Tensor


class PreNormLayer(Protocol):
    """A layer with a norm before each half, the only kind that this is for."""

    input_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP


class OneRowLayers:
    """The layers of a rank that has all heads, used for one row."""

    def __init__(self, layers: Sequence[PreNormLayer], is_sliding: Sequence[bool], device: torch.device) -> None:
        squares = Squares(new_squares(device), new_squares(device))
        next_norms = [layer.input_norm for layer in layers[1:]]
        self._layers = [_OneRowLayer(*both, squares) for both in zip_longest(layers, next_norms)]
        self._is_sliding = is_sliding

    def run(self, x_1D: Tensor, angles: Mapping[bool, Angles], attention: StepAttention, cache: KvCache) -> Tensor:
        """Run all layers as `DecoderStage.run_layers_with` does; ``x`` is overwritten."""
        delta: Tensor | HalfNormed | None = None
        for layer, sliding, layer_cache in zip(self._layers, self._is_sliding, cache.layers, strict=True):
            delta = layer(delta, x_1D, angles[sliding], attention, layer_cache)
        assert isinstance(delta, Tensor), "the last layer gives its delta"
        return x_1D.add_(delta)


class _OneRowLayer:
    """The modules of a layer. ``next_norm`` is the input norm of the layer that follows, if any."""

    def __init__(self, layer: PreNormLayer, next_norm: RMSNorm | None, squares: Squares) -> None:
        self._layer = layer
        self._squares = squares
        self._next_norm = next_norm

    def __call__(
        self,
        delta: Tensor | HalfNormed | None,
        residual_1D: Tensor,
        table_PK: Angles,
        attention: StepAttention,
        cache: LayerCache,
    ) -> Tensor | HalfNormed:
        heads, mlp, sums = self._layer.attention, self._layer.mlp, self._squares
        input_norm, mlp_norm = self._layer.input_norm, self._layer.mlp_norm
        assert attention.packed is not None, "kernels take the packed product"
        assert isinstance(table_PK, Tensor), "kernels turn heads by a table"
        if isinstance(delta, HalfNormed):
            x_1D, squares = delta.x_1D, sums.attention
        else:
            x_1D, squares = self._normed(residual_1D, delta), None
        x_1A = _product(x_1D, heads.qkv, before=NormBefore(squares, sums.mlp, input_norm.eps))
        qkv_1AK = x_1A.view(1, -1, heads.head_dim)
        x_1HK = attention.packed.attend_packed(qkv_1AK, None, table_PK, heads.norms, cache, heads.spec)
        x_1D = _product(x_1HK.view(1, -1), heads.out, after=NormAfter(residual_1D, mlp_norm.weight, sums.mlp))
        before = NormBefore(sums.mlp, sums.attention, mlp_norm.eps)
        x_1F = one_row_matmul(x_1D, mlp.gate_up.held, mlp.gate_up.bias, mlp.activation, before)
        if self._next_norm is None:
            return _product(x_1F, mlp.down)
        after = NormAfter(residual_1D, self._next_norm.weight, sums.attention)
        return HalfNormed(_product(x_1F, mlp.down, after=after))

    def _normed(self, residual_1D: Tensor, delta: Tensor | None) -> Tensor:
        x_1D = self._layer.input_norm.add_and_norm(residual_1D, delta)
        assert isinstance(x_1D, Tensor), "one row is not quantized"
        return x_1D


def _product(x_1I: Tensor, linear: Linear, before: NormBefore | None = None, after: NormAfter | None = None) -> Tensor:
    return one_row_matmul(x_1I, linear.held, linear.bias, before=before, after=after)
