"""What the planner and the workers must know of a model, independent of its file format."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mgpu.protocol.model.attention_facts import FullHeads, LatentFacts, LinearFacts, RopeScaling, Sight
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.weight_format import DENSE, LayerFormats, WeightFormat

CheckpointFormat = Literal["safetensors", "gguf"]
LoadFormat = Literal["auto", "dummy"]
Dtype = Literal["float32", "bfloat16", "float16"]

ModelCode = Literal["auto", "own", "transformers"]
"""Whose modelling code runs a model; auto: mgpu's own if it has the family, else that of the transformers library."""

Activation = Literal["silu", "gelu_tanh"]
"""Of gated feed-forward networks."""

KvCacheDtype = Literal["auto", "fp8"]
"""How keys and values are stored: in the model's dtype, or rounded to float8 (e4m3)."""

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

ARCHITECTURES = (
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen2_5_vl", "qwen3", "gemma2", "gemma3", "phi3",
    "granite", "olmo2", "olmo3", "smollm3", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared",
    "gpt_oss", "qwen3_next", "qwen3_5", "qwen3_5_moe", "gemma4", "deepseek_v2", "deepseek_v3", "mistral4",
    "glm4_moe", "minimax_m2", "llama4",
)  # fmt: skip
"""Family names used inside mgpu; protocol/checkpoint maps Hugging Face and GGUF names to them."""

HYBRID = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
"""Families with layers of linear attention among those of attention."""

LATENT = ("deepseek_v2", "deepseek_v3", "mistral4")
"""Families with latent attention in all layers."""


def kv_element_bytes(stored: KvCacheDtype, dtype: Dtype) -> int:
    """Return the bytes of one component of a key or a value in the cache."""
    return 1 if stored == "fp8" else DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class PerLayerInputs:
    """What each layer adds beside its two halves: from a table of tokens, and from their embedding (Gemma 4 E2B, E4B).

    For each token and layer there are ``size`` components. The table has those of all layers side by side.
    """

    vocab_size: int
    size: int
    form: WeightFormat = DENSE
    """How the table is held. It is only looked up, so it stays packed on any device."""


@dataclass(frozen=True, slots=True)
class BorrowedCode:
    """What is known of a model that runs through transformers' modelling code beyond its sizes."""

    layer_elements: tuple[int, ...]
    """Elements of each layer's tensors; empty if the weights are not there."""
    can_split: bool
    """True if the family's attention can be split over ranks."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shape and arithmetic of a decoder-only transformer. All sizes are counts of elements, not bytes."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    """With latent attention one, which all query heads share and all ranks hold."""
    head_dim: int
    """Of a key in the cache. With latent attention its width, for queries are brought to it."""
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_local_theta: float | None
    """Theta of the sliding-window layers if it differs (Gemma 3 and 4)."""
    rope_scaling: RopeScaling | None
    """For full-attention layers only if ``rope_local_theta`` is set."""
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    """One flag per layer: True if attention sees only the last ``sliding_window`` positions."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    activation: Activation
    embedding_scale: float
    """Factor on the embedding output: sqrt(hidden_size) for Gemma, else 1."""
    attention_scale: float
    """Factor on query-key products: head_dim ** -0.5 in most families."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: Dtype
    experts: ExpertFacts | None = None
    norms_whole_heads: bool = False
    """With ``qk_norm``: all query heads are normalized as one vector, and so are all key heads (OLMo)."""
    rotated_size: int = 0
    """Components of a head that are rotated, the first ones; 0: all."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers without rotary embedding (SmolLM3, Llama 4)."""
    windows_are_chunks: bool = False
    """Sliding layers see what is before a token in its own chunk of ``sliding_window`` positions (Llama 4)."""
    plain_qk_norm: bool = False
    """Queries and keys of each head are normalized without a weight, in layers with rotary embedding (Llama 4)."""
    query_growth: float = 0.0
    """In layers without rotary embedding, queries at position p are multiplied by ``1 + growth * log(1 + (p + 1) //
    growth_from)`` (Llama 4); 0: by 1."""
    growth_from: int = 1
    attention_softcap: float = 0.0
    """Scores of attention become ``cap * tanh(score / cap)`` (Gemma 2); 0: they stay."""
    attention_sinks: bool = False
    """Each query head has a learned score beside those of the context, which takes its share (gpt-oss)."""
    residual_scale: float = 1.0
    """Factor on what each half of a layer adds to the residual stream (Granite)."""
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    """Logits become ``cap * tanh(logit / cap)`` (Gemma 2); 0: they stay."""
    full_heads: FullHeads | None = None
    """Set if layers with full attention have other heads than sliding ones, for which the sizes above then are."""
    keys_are_values: bool = False
    """True if a layer has no projection of values; see `FullHeads`."""
    cache_sources: tuple[int, ...] = ()
    """The layer whose keys and values each layer reads: itself, or an earlier one of its kind; empty: all their own."""
    sharing_width: int = 1
    """Width of the feed-forward networks of layers that read another's cache, in ``intermediate_size``."""
    has_own_keys: bool = True
    """False for a layer that reads another's cache: it projects queries only."""
    per_layer: PerLayerInputs | None = None
    value_norm: bool = False
    """Each value head is normalized too, without a weight (Gemma 4)."""
    layer_scale: bool = False
    """The residual stream is multiplied by a learned number after each layer (Gemma 4)."""
    attention_gate: bool = False
    """The output of each query head is multiplied by the sigmoid of a gate, projected beside the query (Qwen3.5)."""
    left_out: tuple[str, ...] = ()
    """Parts of the model that are not used, in words."""
    linear: LinearFacts | None = None
    """Layers of linear attention among the others; None: there are none."""
    latent: LatentFacts | None = None
    """Sizes of latent attention, which then all layers have."""
    ignored_layers: int = 0
    """Layers after the others that the checkpoint may have, and that are not used."""
    formats: tuple[LayerFormats, ...] = ()
    """How the matrices of each layer are quantized in the checkpoint; empty: they are not."""
    embedding_format: WeightFormat = DENSE
    """How the embedding is held, if no ``--quant`` is asked for; as a GGUF file has it."""
    head_format: WeightFormat = DENSE
    """The same of the head; that of the embedding if they are tied."""
    borrowed: BorrowedCode | None = None
    """Set if transformers' modelling code runs the model. Then facts about arithmetic do not count, only sizes do."""

    @property
    def cached_values(self) -> int:
        """Numbers that a layer of attention caches per token and KV head: a key and a value, or what is both."""
        return self.head_dim if self.latent is not None else 2 * self.head_dim

    @property
    def sight(self) -> Sight:
        """What layers with a window see; (None, False) if there are none."""
        has_windows = any(self.sliding_layers) and self.linear is None
        return (self.sliding_window, self.windows_are_chunks) if has_windows else (None, False)

    @property
    def out_inputs(self) -> int:
        """Inputs of the output projection of attention: the values of all query heads."""
        return self.num_q_heads * (self.head_dim if self.latent is None else self.latent.value_dim)

    @property
    def kv_parts(self) -> tuple[str, ...]:
        """Of a layer's own facts (`of_layer`): its projections beside that of queries."""
        if not self.has_own_keys:
            return ()
        return ("k",) if self.keys_are_values else ("k", "v")

    @property
    def has_dense_layers(self) -> bool:
        """True if the feed-forward network of some layer is dense."""
        return self.experts is None or not all(self.experts.sparse_layers)

    def experts_of(self, layer: int) -> ExpertFacts | None:
        """Return the experts of a layer; None if its feed-forward network is dense."""
        return self.experts if self.experts is not None and self.experts.sparse_layers[layer] else None

    def of_layer(self, layer: int) -> "ModelFacts":
        """Return the facts with the sizes of a layer's own heads and feed-forward network."""
        own, full = self, self.full_heads
        if full is not None and not self.sliding_layers[layer]:
            own = replace(own, num_kv_heads=full.num_kv, head_dim=full.head_dim, keys_are_values=full.keys_are_values)
        if layer in self.unrotated_layers and self.plain_qk_norm:
            own = replace(own, plain_qk_norm=False)
        if layer not in self.unrotated_layers and self.query_growth:
            own = replace(own, query_growth=0.0)
        if self.cache_source(layer) != layer:
            own = replace(own, has_own_keys=False, intermediate_size=self.intermediate_size * self.sharing_width)
        return own if own is self else replace(own, full_heads=None, cache_sources=())

    def kind_of(self, layer: int) -> tuple[bool, bool, bool, bool]:
        """Return what tells layers apart whose tensors have different shapes; those of one kind are alike."""
        has_wide_heads = self.full_heads is not None and not self.sliding_layers[layer]
        is_sharing = self.cache_source(layer) != layer
        return self.experts_of(layer) is not None, self.is_linear(layer), has_wide_heads, is_sharing

    def cache_source(self, layer: int) -> int:
        """Return the layer whose keys and values a layer reads."""
        return self.cache_sources[layer] if self.cache_sources else layer

    def _sources_among(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the cache sources of a model of these layers: the last one before that has a cache of its kind."""
        found: list[int] = []
        for place, layer in enumerate(layers):
            own = [
                at for at in range(place) if found[at] == at and self.kind_of(layers[at])[2] == self.kind_of(layer)[2]
            ]
            found.append(own[-1] if own and self.cache_source(layer) != layer else place)
        return tuple(found) if self.cache_sources else ()

    def is_linear(self, layer: int) -> bool:
        """Return True if a layer has states instead of keys and values."""
        return self.linear is not None and self.linear.layers[layer]

    def count_linear(self, layers: range) -> int:
        """Return how many of some layers have states instead of keys and values."""
        return sum(map(self.is_linear, layers))

    def with_layers(self, layers: Sequence[int]) -> "ModelFacts":
        """Return the facts of a model that consists of these layers of this one."""
        experts = self.experts
        if experts is not None:
            experts = replace(experts, sparse_layers=tuple(experts.sparse_layers[layer] for layer in layers))
        sliding = tuple(self.sliding_layers[layer] for layer in layers)
        unrotated = tuple(place for place, layer in enumerate(layers) if layer in self.unrotated_layers)
        formats = tuple(self.formats[layer] for layer in layers) if self.formats else ()
        linear = self.linear
        if linear is not None:
            linear = replace(linear, layers=tuple(linear.layers[layer] for layer in layers))
        borrowed = self.borrowed
        if borrowed is not None and borrowed.layer_elements:
            borrowed = replace(borrowed, layer_elements=tuple(borrowed.layer_elements[layer] for layer in layers))
        return replace(
            self,
            num_layers=len(layers),
            sliding_layers=sliding,
            experts=experts,
            unrotated_layers=unrotated,
            formats=formats,
            linear=linear,
            borrowed=borrowed,
            cache_sources=self._sources_among(layers),
        )


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the weights are. ``path`` is the model folder, or the GGUF file."""

    path: str
    format: CheckpointFormat
    load_format: LoadFormat = "auto"
    code: ModelCode = "auto"
