"""Self-attention: q, k and v are column parallel by heads, the output projection is row parallel.

Each rank computes its own query heads with the KV heads that they need; where there are more ranks than KV heads,
consecutive ranks hold copies of one. Ranks may have unequal numbers of KV heads (`TensorPart.shares`).
"""

# T tokens, D model dim, H query heads of this rank, J KV heads of this rank, K head dim

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.worker.attention.interface import AttentionSpec, HeadNorms, StepAttention
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.activations import Activations, Product, scaled, values_and_scale
from mgpu.worker.layers.attention.heads import HeadSinks, WholeHeadsNorm, query_factors, with_normalized_values
from mgpu.worker.layers.attention.rotary import Angles, Rotation, rotate
from mgpu.worker.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    Storage,
    gated_slices,
    qkv_slices,
    without_values,
)
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.state.kv_cache import LayerCache


class Attention(Module):
    """Grouped-query attention over the paged cache, with optional biases and per-head norms of q and k."""

    def __init__(
        self,
        facts: ModelFacts,
        group: TensorParallelGroup,
        window: int | None,
        storage: Storage,
        norms_unit_offset: bool = False,
        part: TensorPart | None = None,
    ) -> None:
        part = part or TensorPart(group.rank, group.size)
        heads = part.heads(facts.num_q_heads, facts.num_kv_heads)
        self.head_dim = facts.head_dim
        self.num_q, self.num_kv = heads.num_q, heads.num_kv
        self.has_gates = facts.attention_gate
        self._gate_heads = _kernel_gates() if uses_kernels(storage.device) else _plain_gates
        slices = (gated_slices if facts.attention_gate else qkv_slices)(heads, facts.head_dim)
        if facts.keys_are_values:
            slices = without_values(slices)
        self._value_eps = facts.rms_norm_eps if facts.value_norm else None
        self._normalize_values = _kernel_values() if uses_kernels(storage.device) else with_normalized_values
        held = storage.of_qkv()
        is_apart = facts.attention_gate and held.parts  # queries and gates of all heads are one tensor in the file
        counts = (heads.num_q, 1, 1, heads.num_q) if is_apart else ()
        self.qkv = ColumnParallelLinear(facts.hidden_size, slices, facts.qkv_bias, held, counts)
        columns = range(heads.q_start * facts.head_dim, heads.q_stop * facts.head_dim)
        self.out = RowParallelLinear(columns, facts.hidden_size, facts.output_bias, group, storage.of_out())
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.whole_norm: WholeHeadsNorm | None = None
        if facts.qk_norm and facts.norms_whole_heads:
            totals = facts.num_q_heads, facts.num_kv_heads
            self.whole_norm = WholeHeadsNorm(heads, totals, facts.head_dim, facts.rms_norm_eps, group, storage)
        elif facts.qk_norm:
            of_heads = facts.head_dim, facts.rms_norm_eps, storage.dtype, storage.device, norms_unit_offset, True
            self.q_norm, self.k_norm = RMSNorm(*of_heads), RMSNorm(*of_heads)
        self.sinks = HeadSinks(heads, storage) if facts.attention_sinks else None
        sinks = None if self.sinks is None else self.sinks.weight
        self._plain_norms = _plain_norms(facts, storage) if facts.plain_qk_norm else None
        self._growth = facts.query_growth, facts.growth_from
        self.spec = AttentionSpec(
            facts.attention_scale, window, self._head_norms(), facts.attention_softcap, sinks, facts.windows_are_chunks
        )

    def __call__(self, x_TD: Activations, angles: Angles, attention: StepAttention, cache: LayerCache) -> Delta:
        qkv = self.qkv(x_TD)
        if self.whole_norm is not None:
            qkv = self.whole_norm(self._heads(scaled(qkv))[0]).flatten(1)
        if self._value_eps is not None:
            heads_TAK = self._heads(scaled(qkv))[0]
            qkv = self._normalize_values(heads_TAK, self.num_q, self.num_kv, self._value_eps).flatten(1)
        if self._growth[0]:
            qkv = self._grown(scaled(qkv), attention.positions_T)
        if isinstance(angles, Tensor):
            assert attention.packed is not None, "tables of angles are for packed attention"
            packed_TAK, scale_T = self._heads(qkv)
            qkv_TAK, gates_THK = self._without_gates(packed_TAK)
            heads_THK = attention.packed.attend_packed(qkv_TAK, scale_T, angles, cache, self.spec)
        else:
            scale_T = None
            qkv_TAK, gates_THK = self._without_gates(self._heads(scaled(qkv))[0])
            q_THK, k_TJK, v_TJK = self._rotated(qkv_TAK, angles)
            heads_THK = attention.attend(q_THK, k_TJK, v_TJK, cache, self.spec)
        heads_TN = heads_THK.flatten(1)
        if gates_THK is not None:
            heads_TN = self._gate_heads(heads_TN, gates_THK.flatten(1), scale_T)
        return self.out.partial(heads_TN)

    def _grown(self, qkv_TN: Tensor, positions_T: Tensor) -> Tensor:
        """Multiply the queries by what their positions make them grow to."""
        count = self.num_q * self.head_dim
        grown_TN = qkv_TN[:, :count] * query_factors(positions_T + 1, *self._growth).to(qkv_TN.dtype)
        return torch.cat((grown_TN, qkv_TN[:, count:]), dim=1)

    def _without_gates(self, heads_TAK: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the heads of queries, keys and values, and the gates of the outputs, which lie behind them."""
        if not self.has_gates:
            return heads_TAK, None
        count = self.num_q + 2 * self.num_kv
        return heads_TAK[:, :count], heads_TAK[:, count:]

    def _heads(self, qkv: Product) -> tuple[Tensor, Tensor | None]:
        """Return the stacked heads [T, A, K], and the scale that each token's heads still lack."""
        values, scale_T = values_and_scale(qkv)
        return values.view(len(values), -1, self.head_dim), scale_T

    def _head_norms(self) -> HeadNorms | None:
        """Return the norms of query and key heads, as kernels take them."""
        if self.q_norm is None or self.k_norm is None:
            return self._plain_norms
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def _rotated(self, qkv_TAK: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Split the stacked heads; rotate q and k, in one call if they are not normalized."""
        num_qk = self.num_q + self.num_kv
        if self._plain_norms is not None:
            qk_TAK = F.rms_norm(qkv_TAK[:, :num_qk], (self.head_dim,), eps=self._plain_norms.eps)
            qkv_TAK = torch.cat((qk_TAK, qkv_TAK[:, num_qk:]), dim=1)
        v_TJK = qkv_TAK[:, num_qk:]
        if self.q_norm is None or self.k_norm is None:
            qk = rotate(qkv_TAK[:, :num_qk], rotation)
            return qk[:, : self.num_q], qk[:, self.num_q :], v_TJK
        q_THK = rotate(self.q_norm(qkv_TAK[:, : self.num_q]), rotation)
        k_TJK = rotate(self.k_norm(qkv_TAK[:, self.num_q : num_qk]), rotation)
        return q_THK, k_TJK, v_TJK

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.qkv.load(reader, prefix)
        self.out.load(reader, f"{prefix}.o_proj")
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm.load(reader, f"{prefix}.q_norm")
            self.k_norm.load(reader, f"{prefix}.k_norm")
        if self.whole_norm is not None:
            self.whole_norm.load(reader, prefix)
        if self.sinks is not None:
            self.sinks.load(reader, f"{prefix}.sinks")


def _plain_norms(facts: ModelFacts, storage: Storage) -> HeadNorms:
    """Return norms without weights, as kernels take them."""
    ones_K = torch.ones(facts.head_dim, dtype=storage.dtype, device=storage.device)
    return HeadNorms(ones_K, ones_K, facts.rms_norm_eps)


GateHeads = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(heads [T, N], gates [T, N], what the gates of each token lack) -> heads times the sigmoids of their gates."""


def _plain_gates(heads_TN: Tensor, gates_TN: Tensor, scale_T: Tensor | None) -> Tensor:
    return heads_TN * torch.sigmoid(gates_TN if scale_T is None else gates_TN * scale_T.unsqueeze(1))


def _kernel_values() -> Callable[[Tensor, int, int, float], Tensor]:
    from mgpu.worker.kernels.layers.head_values import with_normalized_values

    return with_normalized_values


def _kernel_gates() -> GateHeads:
    from mgpu.worker.kernels.layers.gates import gate_heads

    return gate_heads
