"""Gemma 4 text: Gemma 3's norms, without the one that is added; then a number multiplies the residual stream."""

# T tokens, D model dim

from torch import Tensor

from mgpu.worker.attention.interface import StepAttention
from mgpu.worker.layers.attention.rotary import Angles
from mgpu.worker.layers.layer_scale import LayerScale
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta, summed
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.stage import BuildContext
from mgpu.worker.state.kv_cache import LayerCache


class Gemma4Layer(Module):
    """The heads of layers with full attention, and experts beside the dense network, are as the model's facts say."""

    def __init__(self, context: BuildContext, layer: int) -> None:
        self.attention = context.shared_attention(layer) or context.attention(layer)
        self.attention_out_norm = context.norm()
        self.mlp = context.mlp(layer)
        self.experts = context.expert_branch(layer)
        self.mlp_out_norm = context.norm()
        self.input_norm = context.norm(before=self.attention.qkv)
        self.mlp_norm = context.norm(before=self.mlp)
        self.layer_input = context.layer_input(layer)
        self.scale = LayerScale(context.storage)

    def __call__(
        self, delta_TD: Delta | None, residual_TD: Tensor, angles: Angles, attention: StepAttention, cache: LayerCache
    ) -> None:
        x_TD = self.input_norm.add_and_norm(residual_TD, delta_TD)
        attended_TD = summed(self.attention(x_TD, angles, attention, cache))
        x_TD = self.mlp_norm.add_normed_and_norm(residual_TD, attended_TD, self.attention_out_norm)
        y_TD = summed(self.mlp(x_TD))
        if self.experts is not None:
            y_TD = self.experts(y_TD, residual_TD)
        if self.layer_input is None:
            self.mlp_out_norm.add_to(residual_TD, y_TD, self.scale.weight)
            return
        self.mlp_out_norm.add_to(residual_TD, y_TD)
        self.layer_input(residual_TD)
        self.scale(residual_TD)

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.input_norm.load(reader, f"{prefix}.input_layernorm")
        self.attention.load(reader, f"{prefix}.self_attn")
        self.attention_out_norm.load(reader, f"{prefix}.post_attention_layernorm")
        self.mlp_norm.load(reader, f"{prefix}.pre_feedforward_layernorm")
        self.mlp.load(reader, f"{prefix}.mlp")
        if self.experts is not None:
            self.experts.load(reader, prefix)
        self.mlp_out_norm.load(reader, f"{prefix}.post_feedforward_layernorm")
        if self.layer_input is not None:
            self.layer_input.load(reader, prefix)
        self.scale.load(reader, f"{prefix}.layer_scalar")
