"""Granite, dense and with experts: Llama's wiring, with a factor on what each half adds to the residual stream."""

# T tokens, D model dim

from torch import Tensor

from mgpu.worker.attention.interface import StepAttention
from mgpu.worker.layers.attention.rotary import Angles
from mgpu.worker.layers.partial_sum import Delta, summed_tensor
from mgpu.worker.models.llama import LlamaLayer
from mgpu.worker.models.stage import BuildContext
from mgpu.worker.state.kv_cache import LayerCache


class GraniteLayer(LlamaLayer):
    """The other factors are the model's facts."""

    def __init__(self, context: BuildContext, layer: int) -> None:
        super().__init__(context, layer)
        self._scale = context.facts.residual_scale

    def __call__(
        self, delta_TD: Delta | None, residual_TD: Tensor, angles: Angles, attention: StepAttention, cache: LayerCache
    ) -> Tensor:
        x_TD = self.input_norm.add_and_norm(residual_TD, delta_TD)
        delta_TD = summed_tensor(self.attention(x_TD, angles, attention, cache)).mul_(self._scale)
        x_TD = self.mlp_norm.add_and_norm(residual_TD, delta_TD)
        return summed_tensor(self.mlp(x_TD)).mul_(self._scale)
