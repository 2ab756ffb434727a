"""Latent attention (MLA): the cache holds one vector per token, of which each head's key and value are projections.

The projections of keys and values need not be applied to the cache. With a head's key k = W c and value v = V c of a
latent c, the score q·k is (Wᵀ q)·c, and the weighted sum of values is V times the weighted sum of latents. So a query
is brought to the width of the latent, all heads attend to the latents themselves as if to one KV head, and what comes
out is brought to the width of values. Example: DeepSeek's cache has 512 + 64 numbers per token instead of 128 heads of
192 + 128. The 64 are a key that is rotated, the same for all heads. On GPUs the contexts of long prompts are projected
all the same (`worker/kernels/attention/latent_prefill.py`).

Split by heads: a rank has some query heads, their projections, and the whole latent, of which every rank has a copy.
"""

# T tokens, H query heads of this rank, C components of a latent without position (with them in kv_TC), R rotated ones,
# P plain ones of a query, V value dim, K = C + R

import torch
from torch import Tensor

from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.worker.attention.interface import AttentionSpec, StepAttention
from mgpu.worker.kernels.attention.inputs import LatentProjections, NewLatents
from mgpu.worker.layers.activations import Activations, scaled
from mgpu.worker.layers.attention.heads import query_factors
from mgpu.worker.layers.attention.rotary import Angles, Rotation, rotate
from mgpu.worker.layers.linear import ColumnParallelLinear, RowParallelLinear, RowSlice, Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.state.kv_cache import LayerCache

_EPS = 1e-6
"""Of the norms of latents, whatever the configuration says of the others."""


class LatentHeads(Module):
    """The projections from latents to keys and values of this rank's heads, [H, P + V, C]. Never quantized.

    They are used in both directions, so no product of a packed matrix serves.
    """

    def __init__(self, latent: LatentFacts, heads: range, storage: Storage) -> None:
        self._plain, self._keys_apart, self._first = latent.plain, latent.keys_apart, heads.start
        shape = len(heads), latent.plain + latent.value_dim, latent.rank
        self.weight = torch.empty(shape, dtype=storage.dtype, device=storage.device)

    def absorb(self, q_THP: Tensor) -> Tensor:
        """Return queries as wide as a latent, [T, H, C]."""
        return torch.bmm(q_THP.transpose(0, 1), self.weight[:, : self._plain]).transpose(0, 1)

    def values(self, attended_THC: Tensor) -> Tensor:
        """Return the values of attended latents, [T, H, V]."""
        weight_HCV = self.weight[:, self._plain :].transpose(1, 2)
        return torch.bmm(attended_THC.transpose(0, 1), weight_HCV).transpose(0, 1)

    def load(self, reader: WeightReader, prefix: str) -> None:
        if not self._keys_apart:
            rows = self.weight.flatten(0, 1)
            reader.fill_rows(rows, f"{prefix}.kv_b_proj.weight", self._first * self.weight.shape[1])
            return
        keys_HPC, values_HVC = self.weight[:, : self._plain], self.weight[:, self._plain :]
        keys_HCP, read_HVC = torch.empty_like(keys_HPC.transpose(1, 2)).contiguous(), torch.empty_like(values_HVC)
        for name, part in (("k_b_proj", keys_HCP), ("v_b_proj", read_HVC)):
            reader.fill_rows(part.flatten(0, 1), f"{prefix}.{name}.weight", self._first * part.shape[1])
        reader.after(lambda: keys_HPC.copy_(keys_HCP.transpose(1, 2)))
        reader.after(lambda: values_HVC.copy_(read_HVC))

    def init_dummy(self, generator: torch.Generator) -> None:
        self.weight.normal_(0.0, self.weight.shape[-1] ** -0.5, generator=generator)

    def weight_bytes(self) -> int:
        return self.weight.nbytes


class LatentAttention(Module):
    """Projections, norms and rotary embedding around attention to latents."""

    def __init__(self, facts: ModelFacts, group: TensorParallelGroup, storage: Storage, part: TensorPart) -> None:
        latent = facts.latent
        assert latent is not None, "the model has latent attention"
        shard = part.heads(facts.num_q_heads, facts.num_kv_heads)
        heads = range(shard.q_start, shard.q_stop)
        self._latent = latent
        queries = range(heads.start * latent.head_dim, heads.stop * latent.head_dim)
        first = RowSlice("q_a_proj", range(latent.query_rank)) if latent.query_rank else RowSlice("q_proj", queries)
        self._first_width = len(first.rows)
        slices = first, RowSlice("kv_a_proj_with_mqa", range(latent.width))
        self.qkv = ColumnParallelLinear(facts.hidden_size, slices, False, storage.of_qkv())
        self.q_norm: RMSNorm | None = None
        self.q_b: ColumnParallelLinear | None = None
        if latent.query_rank:
            self.q_norm = RMSNorm(latent.query_rank, _EPS, storage.dtype, storage.device)
            rows = (RowSlice("q_b_proj", queries),)
            self.q_b = ColumnParallelLinear(latent.query_rank, rows, False, storage.of_q_b())
        self.kv_norm = RMSNorm(latent.rank, _EPS, storage.dtype, storage.device)
        self.heads = LatentHeads(latent, heads, storage)
        columns = range(heads.start * latent.value_dim, heads.stop * latent.value_dim)
        self.out = RowParallelLinear(columns, facts.hidden_size, False, group, storage.of_out())
        self.spec = AttentionSpec(facts.attention_scale, None)

    def __call__(self, x_TD: Activations, angles: Angles, attention: StepAttention, cache: LayerCache) -> Delta:
        latent = self._latent
        first, kv_TC = torch.split(scaled(self.qkv(x_TD)), [self._first_width, latent.width], dim=1)
        if self.q_b is not None and self.q_norm is not None:
            first = scaled(self.q_b(self.q_norm(first)))
        if latent.query_growth:
            factors_T1 = query_factors(attention.positions_T, latent.query_growth, latent.growth_from)
            first = first * factors_T1.to(first.dtype)
        q_THP, q_THR = torch.split(first.view(len(first), -1, latent.head_dim), [latent.plain, latent.rotated], dim=2)
        if isinstance(angles, Tensor):
            assert attention.latents is not None, "tables of angles are for kernels"
            new = NewLatents(kv_TC, q_THR, self.kv_norm.weight, _EPS, latent.is_interleaved)
            heads = LatentProjections(q_THP, self.heads.weight)
            attended_THV = attention.latents.attend_latents(heads, new, angles, cache, self.spec)
        else:
            query_THC = self.heads.absorb(q_THP)
            attended_THV = self.heads.values(self._plain(query_THC, q_THR, kv_TC, angles, attention, cache))
        return self.out.partial(attended_THV.flatten(1))

    def _plain(
        self,
        query_THC: Tensor,
        q_THR: Tensor,
        kv_TC: Tensor,
        angles: Rotation,
        attention: StepAttention,
        cache: LayerCache,
    ) -> Tensor:
        """Return the sums of latents that queries attend to, [T, H, C], in plain torch."""
        latent = self._latent
        c_TC, key_TR = torch.split(kv_TC, [latent.rank, latent.rotated], dim=1)
        rotated_THR = rotate(self._in_halves(q_THR), angles)
        key_T1R = rotate(self._in_halves(key_TR.unsqueeze(1)), angles)
        query_THK = torch.cat((query_THC, rotated_THR), dim=2)
        key_T1K = torch.cat((self.kv_norm(c_TC).unsqueeze(1), key_T1R), dim=2)
        return attention.attend(query_THK, key_T1K, key_T1K, cache, self.spec)[..., : latent.rank]

    def _in_halves(self, x_THR: Tensor) -> Tensor:
        """Return rotated components with the first of each pair in the first half, as `rotate` takes them.

        Queries and keys are reordered alike, so their products stay.
        """
        if not self._latent.is_interleaved:
            return x_THR
        return x_THR.reshape(*x_THR.shape[:2], -1, 2).transpose(2, 3).flatten(2)

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.qkv.load(reader, prefix)
        if self.q_b is not None and self.q_norm is not None:
            self.q_norm.load(reader, f"{prefix}.q_a_layernorm")
            self.q_b.load(reader, prefix)
        self.kv_norm.load(reader, f"{prefix}.kv_a_layernorm")
        self.heads.load(reader, prefix)
        self.out.load(reader, f"{prefix}.o_proj")
