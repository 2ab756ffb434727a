"""The part of a decoder that one rank computes: some layers; the first stage also embeds, the last has the head."""

# T tokens, S rows that sample, D model dim

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import KvCacheDtype, ModelFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.protocol.model.weight_format import DENSE
from mgpu.worker.attention.choose import select_backend
from mgpu.worker.attention.interface import AttentionBackend, AttentionShape, StepAttention
from mgpu.worker.kernels.linear.inputs import has_kernels_for
from mgpu.worker.layers.attention.heads import HeadSinks, WholeHeadsNorm
from mgpu.worker.layers.attention.latent_attention import LatentAttention, LatentHeads
from mgpu.worker.layers.attention.linear_attention import LinearConstants
from mgpu.worker.layers.attention.rotary import Angles, RotaryEmbedding
from mgpu.worker.layers.attention.self_attention import Attention
from mgpu.worker.layers.attention.shared_attention import SharedAttention
from mgpu.worker.layers.experts.cpu_experts import CpuExperts, HostRows
from mgpu.worker.layers.experts.expert_branch import ExpertBranch, RouterScales
from mgpu.worker.layers.experts.experts import ExpertMatrices, Experts
from mgpu.worker.layers.experts.router import ExpertCorrection
from mgpu.worker.layers.experts.sparse_mlp import SparseMLP
from mgpu.worker.layers.layer_scale import LayerScale
from mgpu.worker.layers.linear import Linear, Storage
from mgpu.worker.layers.mlp import GatedMLP
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.norm import RMSNorm
from mgpu.worker.layers.partial_sum import Delta, summed_tensor
from mgpu.worker.layers.per_layer_inputs import LayerInput, PerLayerInputs
from mgpu.worker.layers.vocab import VocabParallel
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import KvCache, LayerCache

WEIGHT_HOLDERS = (
    Linear, ExpertMatrices, ExpertCorrection, RouterScales, LatentHeads, LinearConstants, RMSNorm, HeadSinks,
    WholeHeadsNorm, LayerScale, VocabParallel,
)  # fmt: skip
"""The modules that own weights; all others are wiring."""


AngleKind = tuple[bool, bool]
"""Of a layer: whether its attention slides, and whether its heads are rotated."""


Ends = tuple[bool, bool]
"""Whether a stage is the first, which embeds tokens, and whether it is the last, which has norm and head."""


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What every module of a stage is built from."""

    facts: ModelFacts
    group: TensorParallelGroup
    storage: Storage
    kv_cache_dtype: KvCacheDtype = "auto"
    expert_split: ExpertSplit = "tensor"
    shares: tuple[int, ...] = ()
    """KV heads of each rank, where they differ."""
    ends: Ends | None = None
    """None: the stage of the first layer embeds, that of the last has the head."""

    cpu_experts: tuple[int, ...] = ()
    """Layers whose experts are on the CPU, wherever the layers are."""
    cpu_rows: HostRows | None = None
    """How rows reach these experts."""
    per_layer: PerLayerInputs | None = None

    def with_per_layer(self) -> "BuildContext":
        """Return the context of a stage whose layers have inputs of their own, if the model has them."""
        if (per := self.facts.per_layer) is None:
            return self
        return replace(self, per_layer=PerLayerInputs(self.facts, per, self.group, self.storage, self.part))

    def ends_of(self, layers: range) -> Ends:
        """Return whether the stage of these layers embeds tokens, and whether it has the head."""
        return self.ends or (layers.start == 0, layers.stop == self.facts.num_layers)

    @property
    def part(self) -> TensorPart:
        """The part of each layer that this rank holds."""
        return TensorPart(self.group.rank, self.group.size, self.shares)

    def window_of(self, layer: int) -> int | None:
        return self.facts.sliding_window if self.facts.sliding_layers[layer] else None

    def storage_of(self, layer: int) -> Storage:
        """Return how a layer's weights are held: as `--quant` says, else as the checkpoint has them."""
        if self.storage.form.quant != "none" or not self.facts.formats:
            return self.storage
        return replace(self.storage, layer=self.facts.formats[layer])

    def attention(self, layer: int, norms_unit_offset: bool = False) -> Attention | LatentAttention:
        """Make the attention of a layer, over keys and values of heads or over latents."""
        if self.facts.latent is not None:
            return LatentAttention(self.facts, self.group, self.storage_of(layer), self.part)
        how = self.window_of(layer), self.storage_of(layer), norms_unit_offset
        return Attention(self.facts.of_layer(layer), self.group, *how, self.part)

    def mlp(self, layer: int) -> GatedMLP | SparseMLP:
        """Make the feed-forward network of a layer: dense, or a mixture of experts that is not a branch beside it."""
        facts, storage = self.facts.of_layer(layer), self.storage_of(layer)
        if (experts := facts.experts_of(layer)) is not None:
            if not experts.is_branch:
                how = self.expert_split, self.group, storage, self.part, self._cpu_rows_of(layer)
                return SparseMLP(facts, experts, *how)
            storage = storage.of_shared()
        sizes = facts.hidden_size, facts.intermediate_size
        return GatedMLP(*sizes, facts.activation, facts.mlp_bias, self.group, storage, self.part)

    def shared_attention(self, layer: int) -> SharedAttention | None:
        """Make the attention of a layer that reads the cache of another; None if it has its own."""
        if self.facts.cache_source(layer) == layer:
            return None
        where = self.group, self.window_of(layer), self.storage_of(layer), self.part
        return SharedAttention(self.facts.of_layer(layer), *where)

    def layer_input(self, layer: int) -> LayerInput | None:
        """Make what a layer does with its own input; None if layers have none."""
        if self.facts.per_layer is None or self.per_layer is None:
            return None
        return LayerInput(self.per_layer, self.facts, self.facts.per_layer, layer, self.storage)

    def expert_branch(self, layer: int) -> ExpertBranch | None:
        """Make the experts that a layer has beside its dense network; None if it has none."""
        if (experts := self.facts.experts_of(layer)) is None:
            return None
        how = self.expert_split, self.group, self.storage_of(layer), self.part, self._cpu_rows_of(layer)
        return ExpertBranch(self.facts, experts, *how)

    def _cpu_rows_of(self, layer: int) -> HostRows | None:
        return self.cpu_rows if layer in self.cpu_experts else None

    def vocab(self, is_head: bool = False) -> VocabParallel:
        """Make the embedding, or a head of its own."""
        sizes = self.facts.vocab_size, self.facts.hidden_size
        form = self.facts.head_format if is_head else self.facts.embedding_format
        form = form if self.storage.form.quant == "none" else DENSE
        return VocabParallel(*sizes, self.group, self.storage.dtype, self.storage.device, self.part, form)

    def norm(self, unit_offset: bool = False, before: Linear | GatedMLP | SparseMLP | None = None) -> RMSNorm:
        """Make a norm over the model dimension. ``before``: the only layer that its result goes into."""
        if isinstance(before, GatedMLP):
            before = before.gate_up
        facts, storage = self.facts, self.storage
        norm = RMSNorm(facts.hidden_size, facts.rms_norm_eps, storage.dtype, storage.device, unit_offset)
        if isinstance(before, Linear):
            norm.takes_float8 = before.takes_float8
        return norm


class DecoderLayer(Protocol):
    """One layer of a family. It updates the residual stream in place, except for its last ``delta``."""

    def __call__(
        self, delta_TD: Delta | None, residual_TD: Tensor, angles: Angles, attention: StepAttention, cache: LayerCache
    ) -> Delta | None:
        """Add ``delta`` to ``residual``, compute the layer, and return its own delta for the next one to add.

        None: the layer has added it already.
        """
        ...

    def load(self, reader: WeightReader, prefix: str) -> None: ...


class LayerFactory(Protocol):
    def __call__(self, context: BuildContext, layer: int) -> DecoderLayer: ...


class DecoderStage(Module):
    """Some layers of a model on one rank; also the embedding before the first, and norm and head after the last.

    An embedding or a head that is on another device than its neighbouring layers is a stage without layers.
    """

    def __init__(
        self, context: BuildContext, layers: range, make_layer: LayerFactory, norms_unit_offset: bool = False
    ) -> None:
        facts, context = context.facts, context.with_per_layer()
        self.facts = facts
        self.per_layer = context.per_layer
        self.layer_range = layers
        self._is_split = context.group.size > 1
        self.dtype = context.storage.dtype
        self.device = context.storage.device
        self.max_positions = facts.max_position
        """Positions in the tables of angles. A server with shorter requests lowers it before the first step."""
        self.is_first, self.is_last = context.ends_of(layers)
        self.embedding_scale = float(torch.tensor(facts.embedding_scale, dtype=self.dtype))
        self.layers = [make_layer(context, index) for index in layers]
        self.norm = context.norm(norms_unit_offset) if self.is_last else None
        self.embedding = context.vocab() if self.is_first else None
        self.head: VocabParallel | None = None
        if self.is_last:
            is_tied = self.embedding is not None and facts.tie_embeddings
            self.head = self.embedding if is_tied else context.vocab(is_head=True)
        self._angle_kinds: list[AngleKind] = [
            (facts.sliding_layers[index], index not in facts.unrotated_layers) for index in layers
        ]
        self._rotary = _rotary_embeddings(facts, self.device)
        self.attention_shape = self._shape_of_attention(context)

    @cached_property
    def _attention_backend(self) -> AttentionBackend:
        """Chosen when first needed: on a GPU the choice compiles kernels, and weights must not wait for that."""
        return select_backend(self.device, self.attention_shape)

    def choose_attention(self) -> AttentionBackend:
        """Choose now: the check of kernels takes memory, which must not be counted as a step's."""
        return self._attention_backend

    def assume_kernels(self) -> None:
        """Use the kernels without checking them, if there are any for the sizes of latents."""
        from mgpu.worker.attention.latent_check import latent_obstacle
        from mgpu.worker.attention.triton_backend import TritonBackend

        linear, latent = self.facts.linear, self.facts.latent
        if latent is not None and latent_obstacle(self.attention_shape, latent) is not None:
            return
        self._attention_backend = TritonBackend(
            linear is not None and has_kernels_for(linear, self.dtype), self.attention_shape.expanded_bytes
        )

    def _shape_of_attention(self, context: BuildContext) -> AttentionShape:
        facts = self.facts
        is_plain = not facts.attention_softcap
        linear = facts.linear if facts.count_linear(self.layer_range) else None
        shapes: list[AttentionShape] = []
        for has_wide_heads in (False, True):
            layers = [index for index in self.layer_range if facts.kind_of(index)[2] == has_wide_heads]
            own = facts.of_layer(layers[0]) if layers else facts
            heads = context.part.heads(own.num_q_heads, own.num_kv_heads)
            windows = tuple({context.window_of(index): None for index in layers})
            sizes = heads.num_q, heads.num_kv, own.head_dim
            shapes.append(AttentionShape(*sizes, self.dtype, windows, context.kv_cache_dtype, is_plain, linear))
        wide = shapes[1] if shapes[1].windows else None
        in_chunks, has_sinks = facts.windows_are_chunks, facts.attention_sinks
        return replace(shapes[0], wide=wide, latent=facts.latent, in_chunks=in_chunks, has_sinks=has_sinks)

    @property
    def has_owners(self) -> bool:
        """True if kernels of some layers ask for the row of each token of a prompt."""
        return self.facts.linear is not None or self.facts.latent is not None

    @property
    def has_kernels(self) -> bool:
        """True if a step can be captured as a CUDA graph: its kernels read lengths and tables on the device.

        Norms over all heads add up numbers of the ranks in a way that cannot be captured.
        """
        backend = self._attention_backend
        if self.attention_shape.linear is not None and not backend.has_states:
            return False
        if not backend.takes_packed or (self._is_split and self.facts.norms_whole_heads):
            return False
        return not any(part.waits_for_host for _, part in self.named_modules())

    def _angles(self, positions_T: Tensor) -> dict[AngleKind, Angles]:
        """Return the angles for each kind of layer that the stage has."""
        kinds = set(self._angle_kinds)
        if self._attention_backend.takes_packed:
            return {kind: self._rotary[kind].table(self.max_positions) for kind in kinds}
        return {kind: self._rotary[kind](positions_T, self.dtype, self.max_positions) for kind in kinds}

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Return the first layer's input [T, D]."""
        assert self.embedding is not None, "only the first stage has the embedding"
        x_TD = self.embedding.embed(token_ids_T)
        x_TD = x_TD if self.embedding_scale == 1.0 else x_TD.mul_(self.embedding_scale)
        if self.per_layer is not None:
            self.per_layer.prepare(token_ids_T, x_TD)
        return x_TD

    def run_layers(self, x_TD: Tensor, batch: StepBatch, cache: KvCache) -> Tensor:
        """Run this stage's layers over ``x``, which is overwritten; return what the next stage or `logits` takes."""
        attention = self._attention_backend.begin_step(batch, cache.block_size)
        return self.run_layers_with(x_TD, attention, batch.positions, cache)

    def run_layers_with(self, x_TD: Tensor, attention: StepAttention, positions_T: Tensor, cache: KvCache) -> Tensor:
        """Run the layers with attention that was prepared elsewhere."""
        angles = self._angles(positions_T)
        delta_TD: Delta | None = None
        for layer, kind, layer_cache in zip(self.layers, self._angle_kinds, cache.layers, strict=True):
            delta_TD = layer(delta_TD, x_TD, angles[kind], attention, layer_cache)
        return x_TD if delta_TD is None else x_TD.add_(summed_tensor(delta_TD))

    def logits(self, x_SD: Tensor) -> Tensor:
        """Apply norm and head; return this rank's part of the logits, float32 [S, padded vocabulary / ranks]."""
        return self.raw_logits(x_SD).float()

    def raw_logits(self, x_SD: Tensor) -> Tensor:
        """Like `logits`, but in the model's dtype."""
        assert self.norm is not None, "only the last stage has the norm and the head"
        assert self.head is not None
        logits_SW = self.head.logits(self.norm(x_SD))
        if self.facts.logit_scale != 1.0:
            logits_SW = logits_SW.mul_(self.facts.logit_scale)
        if cap := self.facts.logit_softcap:
            # Padding stays at -inf, which the tanh would make -cap.
            capped_SW = torch.tanh(logits_SW / cap) * cap
            logits_SW = capped_SW.masked_fill_(logits_SW == -torch.inf, -torch.inf)
        return logits_SW

    def load(self, reader: WeightReader) -> None:
        """Fill every weight from the checkpoint, in the order of the files."""
        if self.embedding is not None:
            self.embedding.load(reader, "model.embed_tokens")
        if self.per_layer is not None:
            self.per_layer.load(reader)
        for index, layer in zip(self.layer_range, self.layers, strict=True):
            layer.load(reader, f"model.layers.{index}")
        if self.norm is not None and self.head is not None:
            self.norm.load(reader, "model.norm")
            if self.head is not self.embedding:
                self.head.load(reader, "model.embed_tokens" if self.facts.tie_embeddings else "lm_head")

    def finalize(self) -> None:
        """Repack all weights for the device, once, after loading."""
        for _, module in self.named_modules():
            if isinstance(module, (Linear, Experts, CpuExperts)):
                module.finalize()
        if self.head is not None:
            self.head.finalize_head(is_embedding_too=self.head is self.embedding)

    def weight_bytes(self) -> int:
        """Return the bytes of all weights, packed ones included; a tied matrix counts once."""
        return sum(module.weight_bytes() for _, module in self.named_modules() if isinstance(module, WEIGHT_HOLDERS))


def _rotary_embeddings(facts: ModelFacts, device: torch.device) -> dict[AngleKind, RotaryEmbedding]:
    """Make the rotary embedding of each kind of layer; sliding ones differ in Gemma 3 and 4 and OLMo 3 only."""
    size = facts.head_dim if facts.latent is None else facts.latent.rotated
    rotated = facts.rotated_size or size
    full = RotaryEmbedding(size, facts.rope_theta, facts.rope_scaling, device, rotated)
    if (wide := facts.full_heads) is not None:
        # The speeds of a whole head's first pairs are those of a smaller head with this theta.
        theta = facts.rope_theta ** (wide.rotated_size / wide.head_dim)
        full = RotaryEmbedding(wide.head_dim, theta, facts.rope_scaling, device, wide.rotated_size)
    still = RotaryEmbedding(size, facts.rope_theta, None, device, rotated=0)
    sliding = full
    if facts.rope_local_theta is not None:
        sliding = RotaryEmbedding(size, facts.rope_local_theta, None, device, rotated)
    return {(False, True): full, (True, True): sliding, (False, False): still, (True, False): still}
