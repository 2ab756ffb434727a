"""Weights of attention beside its projections: scores of sinks, and norms over all heads at once."""

# T tokens, A packed heads, H query heads of this rank, J KV heads of this rank, K head dim

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.placement import HeadShard
from mgpu.worker.layers.linear import Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup


class HeadSinks(Module):
    """A learned score of each query head, which takes its share of attention and gives nothing for it (gpt-oss)."""

    def __init__(self, heads: HeadShard, storage: Storage) -> None:
        self._start = heads.q_start
        self.weight = torch.empty(heads.num_q, dtype=storage.dtype, device=storage.device)

    def load(self, reader: WeightReader, name: str) -> None:
        reader.fill_rows(self.weight, name, self._start)

    def init_dummy(self, generator: torch.Generator) -> None:
        self.weight.zero_()

    def weight_bytes(self) -> int:
        return self.weight.nbytes


def query_factors(places_T: Tensor, growth: float, start: int) -> Tensor:
    """Return the float32 factor [T, 1] on each token's queries: ``1 + growth * log(1 + place // start)``."""
    return (1.0 + growth * torch.log1p((places_T // start).float())).unsqueeze(1)


def with_normalized_values(heads_TAK: Tensor, num_q: int, num_kv: int, eps: float) -> Tensor:
    """Return packed heads whose values are normalized, without a weight (Gemma 4).

    Heads that lack values get those of their keys.
    """
    num_qk = num_q + num_kv
    stored_TJK = heads_TAK[:, -num_kv:]  # values, or keys if these are the last heads
    values_TJK = F.rms_norm(stored_TJK.float(), stored_TJK.shape[-1:], eps=eps).to(heads_TAK.dtype)
    return torch.cat((heads_TAK[:, :num_qk], values_TJK), dim=1)


class WholeHeadsNorm(Module):
    """RMSNorm of all query heads as one vector, and of all key heads, before they are rotated (OLMo).

    Each rank has some of the heads, so the ranks add up their sums of squares. Ranks that hold copies of a KV head
    count their part of it only. ``totals`` are the query heads and the KV heads of all ranks.
    """

    def __init__(
        self,
        heads: HeadShard,
        totals: tuple[int, int],
        head_dim: int,
        eps: float,
        group: TensorParallelGroup,
        storage: Storage,
    ) -> None:
        self._heads, self._head_dim, self._eps, self._group = heads, head_dim, eps, group
        self._num_qk = heads.num_q + heads.num_kv
        self._lengths_2 = torch.tensor([count * head_dim for count in totals], device=storage.device)
        self.weight = torch.empty((self._num_qk, head_dim), dtype=storage.dtype, device=storage.device)

    def __call__(self, qkv_TAK: Tensor) -> Tensor:
        """Return the packed heads with queries and keys normalized."""
        num_q, num_qk = self._heads.num_q, self._num_qk
        squares_TA = qkv_TAK[:, :num_qk].float().square().sum(-1)
        sums_T2 = torch.stack((squares_TA[:, :num_q].sum(-1), squares_TA[:, num_q:].sum(-1)), dim=1)
        if self._group.size > 1:
            sums_T2[:, 1] /= self._heads.kv_replicas
            sums_T2 = self._group.all_reduce(sums_T2)
        scales_T2 = torch.rsqrt(sums_T2 / self._lengths_2 + self._eps)
        parts = (qkv_TAK[:, :num_q], scales_T2[:, :1]), (qkv_TAK[:, num_q:num_qk], scales_T2[:, 1:])
        heads_TAK = torch.cat([(part.float() * scale.unsqueeze(2)) for part, scale in parts], dim=1)
        return torch.cat((heads_TAK.to(qkv_TAK.dtype) * self.weight, qkv_TAK[:, num_qk:]), dim=1)

    def load(self, reader: WeightReader, prefix: str) -> None:
        heads, size = self._heads, self._head_dim
        flat = self.weight.view(-1)
        reader.fill_rows(flat[: heads.num_q * size], f"{prefix}.q_norm.weight", heads.q_start * size)
        reader.fill_rows(flat[heads.num_q * size :], f"{prefix}.k_norm.weight", heads.kv_start * size)

    def init_dummy(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

    def weight_bytes(self) -> int:
        return self.weight.nbytes
