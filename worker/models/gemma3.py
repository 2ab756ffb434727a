"""Gemma 2 and 3 text: norms on both sides of attention and feed-forward, with weights stored minus one."""

# T tokens, D model dim

from torch import Tensor

from mgpu.worker.attention.interface import StepAttention
from mgpu.worker.layers.activations import Product
from mgpu.worker.layers.attention.rotary import Angles
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta, summed
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.stage import BuildContext
from mgpu.worker.state.kv_cache import LayerCache


class Gemma3Layer(Module):
    """The output of each half is normalized before it joins the residual stream."""

    def __init__(self, context: BuildContext, layer: int) -> None:
        self.attention = context.attention(layer, norms_unit_offset=True)
        self.attention_out_norm = context.norm(unit_offset=True)
        self.mlp = context.mlp(layer)
        self.mlp_out_norm = context.norm(unit_offset=True)
        self.input_norm = context.norm(unit_offset=True, before=self.attention.qkv)
        self.mlp_norm = context.norm(unit_offset=True, before=self.mlp)

    def __call__(
        self, delta_TD: Delta | None, residual_TD: Tensor, angles: Angles, attention: StepAttention, cache: LayerCache
    ) -> Product:
        x_TD = self.input_norm.add_and_norm(residual_TD, delta_TD)
        attended_TD = summed(self.attention(x_TD, angles, attention, cache))
        x_TD = self.mlp_norm.add_normed_and_norm(residual_TD, attended_TD, self.attention_out_norm)
        return self.mlp_out_norm(summed(self.mlp(x_TD)))

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.input_norm.load(reader, f"{prefix}.input_layernorm")
        self.attention.load(reader, f"{prefix}.self_attn")
        self.attention_out_norm.load(reader, f"{prefix}.post_attention_layernorm")
        self.mlp_norm.load(reader, f"{prefix}.pre_feedforward_layernorm")
        self.mlp.load(reader, f"{prefix}.mlp")
        self.mlp_out_norm.load(reader, f"{prefix}.post_feedforward_layernorm")
