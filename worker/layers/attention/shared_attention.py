"""Self-attention that reads the keys and values of an earlier layer: it projects queries only (Gemma 4 E2B, E4B)."""

# T tokens, D model dim, H query heads of this rank, K head dim

from torch import Tensor

from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.worker.attention.interface import AttentionSpec, HeadNorms, StepAttention
from mgpu.worker.layers.activations import Activations, scaled, values_and_scale
from mgpu.worker.layers.attention.rotary import Angles, rotate
from mgpu.worker.layers.linear import ColumnParallelLinear, RowParallelLinear, Storage, qkv_slices
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.state.kv_cache import LayerCache


class SharedAttention(Module):
    """``facts`` are the layer's own. Its cache is that of the layer that writes it."""

    def __init__(
        self, facts: ModelFacts, group: TensorParallelGroup, window: int | None, storage: Storage, part: TensorPart
    ) -> None:
        heads = part.heads(facts.num_q_heads, facts.num_kv_heads)
        self._head_dim = facts.head_dim
        self.qkv = ColumnParallelLinear(
            facts.hidden_size, qkv_slices(heads, facts.head_dim)[:1], facts.qkv_bias, storage.of_qkv()
        )
        columns = range(heads.q_start * facts.head_dim, heads.q_stop * facts.head_dim)
        self.out = RowParallelLinear(columns, facts.hidden_size, facts.output_bias, group, storage.of_out())
        of_heads = facts.head_dim, facts.rms_norm_eps, storage.dtype, storage.device
        self.q_norm = RMSNorm(*of_heads, of_heads=True)
        norms = HeadNorms(self.q_norm.weight, self.q_norm.weight, self.q_norm.eps)
        self.spec = AttentionSpec(facts.attention_scale, window, norms, facts.attention_softcap)

    def __call__(self, x_TD: Activations, angles: Angles, attention: StepAttention, cache: LayerCache) -> Delta:
        q = self.qkv(x_TD)
        if isinstance(angles, Tensor):
            assert attention.packed is not None, "tables of angles are for packed attention"
            values, scale_T = values_and_scale(q)
            q_THK = values.view(len(values), -1, self._head_dim)
            heads_THK = attention.packed.attend_shared_packed(q_THK, scale_T, angles, cache, self.spec)
        else:
            q_THK = self.q_norm(scaled(q).view(len(scaled(q)), -1, self._head_dim))
            heads_THK = attention.attend_shared(rotate(q_THK, angles), cache, self.spec)
        return self.out.partial(heads_THK.flatten(1))

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.qkv.load(reader, prefix)
        self.out.load(reader, f"{prefix}.o_proj")
        self.q_norm.load(reader, f"{prefix}.q_norm")
