"""OLMo 2 and 3: the output of each half is normalized before it joins the residual stream, its input is not."""

# T tokens, D model dim

from torch import Tensor

from mgpu.worker.attention.interface import StepAttention
from mgpu.worker.layers.activations import Product, scaled
from mgpu.worker.layers.attention.rotary import Angles
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta, summed, summed_tensor
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.stage import BuildContext
from mgpu.worker.state.kv_cache import LayerCache


class OlmoLayer(Module):
    """Queries and keys are normalized over all heads at once, as the model's facts say."""

    def __init__(self, context: BuildContext, layer: int) -> None:
        self.attention = context.attention(layer)
        self.attention_out_norm = context.norm()
        self.mlp = context.mlp(layer)
        self.mlp_out_norm = context.norm()

    def __call__(
        self, delta_TD: Delta | None, residual_TD: Tensor, angles: Angles, attention: StepAttention, cache: LayerCache
    ) -> Product:
        if delta_TD is not None:
            residual_TD.add_(summed_tensor(delta_TD))
        attended = self.attention_out_norm(summed(self.attention(residual_TD, angles, attention, cache)))
        residual_TD.add_(scaled(attended))
        return self.mlp_out_norm(summed(self.mlp(residual_TD)))

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.attention.load(reader, f"{prefix}.self_attn")
        self.attention_out_norm.load(reader, f"{prefix}.post_attention_layernorm")
        self.mlp.load(reader, f"{prefix}.mlp")
        self.mlp_out_norm.load(reader, f"{prefix}.post_feedforward_layernorm")
