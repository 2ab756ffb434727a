"""Llama 2 and 3, SmolLM2, Mistral, Mixtral, Qwen: norm before attention and before the feed-forward network."""

# T tokens, D model dim

from torch import Tensor

from mgpu.worker.attention.interface import StepAttention
from mgpu.worker.layers.attention.rotary import Angles
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.stage import BuildContext
from mgpu.worker.state.kv_cache import LayerCache


class LlamaLayer(Module):
    """Biases, the norms of q and k, and experts are as the model's facts say."""

    def __init__(self, context: BuildContext, layer: int) -> None:
        self.attention = context.attention(layer)
        self.mlp = context.mlp(layer)
        self.input_norm = context.norm(before=self.attention.qkv)
        self.mlp_norm = context.norm(before=self.mlp)

    def __call__(
        self, delta_TD: Delta | None, residual_TD: Tensor, angles: Angles, attention: StepAttention, cache: LayerCache
    ) -> Delta:
        x_TD = self.input_norm.add_and_norm(residual_TD, delta_TD)
        delta_TD = self.attention(x_TD, angles, attention, cache)
        x_TD = self.mlp_norm.add_and_norm(residual_TD, delta_TD)
        return self.mlp(x_TD)

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.input_norm.load(reader, f"{prefix}.input_layernorm")
        self.attention.load(reader, f"{prefix}.self_attn")
        self.mlp_norm.load(reader, f"{prefix}.post_attention_layernorm")
        self.mlp.load(reader, f"{prefix}.mlp")
