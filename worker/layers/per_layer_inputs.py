"""Inputs that each layer has from the token itself, beside the residual stream (Gemma 4 E2B and E4B).

For each token and layer there are P numbers: a row of a table of tokens plus a projection of the embedding, for all
layers at once before the first. A layer multiplies what it projects of the stream by them, and adds the product back.
"""

# T tokens, D model dim, L layers, P components of a layer's input

import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.facts import PerLayerInputs as PerLayerFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.worker.layers.activations import scaled
from mgpu.worker.layers.linear import Linear, Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.layers.vocab import VocabParallel
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup


class WholeLinear(Linear):
    """A linear layer that all ranks hold whole, since it is small. Never quantized."""

    def __init__(self, inputs: int, outputs: int, storage: Storage) -> None:
        super().__init__(inputs, outputs, False, Storage(storage.dtype, storage.device))

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, f"{name}.weight")


class PerLayerInputs(Module):
    """Computes the inputs of all layers; they hold for one step, from `prepare` to the next one."""

    def __init__(
        self, facts: ModelFacts, per: PerLayerFacts, group: TensorParallelGroup, storage: Storage, part: TensorPart
    ) -> None:
        self._layers, self._size = facts.num_layers, per.size
        width = facts.num_layers * per.size
        self.table = VocabParallel(per.vocab_size, width, group, storage.dtype, storage.device, part, per.form)
        self.projection = WholeLinear(facts.hidden_size, width, storage)
        self.norm = RMSNorm(per.size, facts.rms_norm_eps, storage.dtype, storage.device)
        self._scale = facts.hidden_size**-0.5
        self._now_TLP: Tensor | None = None

    def prepare(self, token_ids_T: Tensor, x_TD: Tensor) -> None:
        """Compute the inputs of tokens with the scaled embedding ``x``."""
        rows_TLP = self._by_layer(self.table.embed(token_ids_T)) * self._size**0.5
        projected = (scaled(self.projection(x_TD)) * self._scale).view(-1, self._size)
        self._now_TLP = (self._by_layer(self.norm(projected)) + rows_TLP) * 0.5**0.5

    def of(self, layer: int) -> Tensor:
        """Return the input of a layer [T, P]."""
        assert self._now_TLP is not None, "the step has been prepared"
        return self._now_TLP[:, layer]

    def _by_layer(self, x: Tensor) -> Tensor:
        return x.view(-1, self._layers, self._size)

    def load(self, reader: WeightReader) -> None:
        self.table.load(reader, "model.embed_tokens_per_layer")
        self.projection.load(reader, "model.per_layer_model_projection")
        self.norm.load(reader, "model.per_layer_projection_norm")


class LayerInput(Module):
    """The part of one layer."""

    def __init__(self, inputs: PerLayerInputs, facts: ModelFacts, per: PerLayerFacts, layer: int, storage: Storage):
        self._inputs, self._layer = inputs, layer
        self.gate = WholeLinear(facts.hidden_size, per.size, storage)
        self.projection = WholeLinear(per.size, facts.hidden_size, storage)
        self.norm = RMSNorm(facts.hidden_size, facts.rms_norm_eps, storage.dtype, storage.device)

    def __call__(self, residual_TD: Tensor) -> None:
        """Add to the residual stream."""
        gate_TP = F.gelu(scaled(self.gate(residual_TD)), approximate="tanh")
        residual_TD.add_(scaled(self.norm(self.projection(gate_TP * self._inputs.of(self._layer)))))

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.gate.load(reader, f"{prefix}.per_layer_input_gate")
        self.projection.load(reader, f"{prefix}.per_layer_projection")
        self.norm.load(reader, f"{prefix}.post_per_layer_input_norm")
