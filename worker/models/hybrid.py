"""Qwen3-Next, Qwen3.5: most layers have linear attention, the others attention with gated heads. Norms store w - 1."""

# T tokens, D model dim

from torch import Tensor

from mgpu.worker.attention.interface import StepAttention
from mgpu.worker.layers.attention.linear_attention import LinearAttention
from mgpu.worker.layers.attention.rotary import Angles
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.stage import BuildContext
from mgpu.worker.state.kv_cache import LayerCache


class HybridLayer(Module):
    """Either kind of attention, then a dense network or experts, as the model's facts say."""

    def __init__(self, context: BuildContext, layer: int) -> None:
        self.linear: LinearAttention | None = None
        if context.facts.is_linear(layer):
            self.linear = LinearAttention(context.facts, context.group, context.storage_of(layer))
            self.input_norm = context.norm(unit_offset=True)
        else:
            self.attention = context.attention(layer, norms_unit_offset=True)
            self.input_norm = context.norm(unit_offset=True, before=self.attention.qkv)
        self.mlp = context.mlp(layer)
        self.mlp_norm = context.norm(unit_offset=True, before=self.mlp)

    def __call__(
        self, delta_TD: Delta | None, residual_TD: Tensor, angles: Angles, attention: StepAttention, cache: LayerCache
    ) -> Delta:
        x_TD = self.input_norm.add_and_norm(residual_TD, delta_TD)
        if self.linear is not None:
            assert cache.states is not None, "a linear layer has states"
            delta_TD = self.linear(x_TD, attention, cache.states)
        else:
            delta_TD = self.attention(x_TD, angles, attention, cache)
        x_TD = self.mlp_norm.add_and_norm(residual_TD, delta_TD)
        return self.mlp(x_TD)

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.input_norm.load(reader, f"{prefix}.input_layernorm")
        if self.linear is not None:
            self.linear.load(reader, f"{prefix}.linear_attn")
        else:
            self.attention.load(reader, f"{prefix}.self_attn")
        self.mlp_norm.load(reader, f"{prefix}.post_attention_layernorm")
        self.mlp.load(reader, f"{prefix}.mlp")
