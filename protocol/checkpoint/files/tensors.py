"""Name the tensors that a model must have, and where each one lies."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.model.attention_facts import LatentFacts, LinearFacts
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.weight_format import WeightFormat

BLOCKS: dict[str, tuple[int, int]] = {
    "F64": (1, 8), "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17),
}  # fmt: skip
"""Elements and bytes of a block of each type that can be loaded; for GGUF's types from ggml's ggml-common.h."""

_IGNORED_ENDINGS = (
    ".rotary_emb.inv_freq", ".attn.masked_bias", ".attn_rot_embd.weight", ".k_scale", ".v_scale", ".q_scale",
    ".kv_scale", ".prob_scale", ".output_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point", ".input_scale",
    ".input_zero_point", ".input_scale_ub",
)  # fmt: skip
"""Constants that old checkpoints store, although they follow from the configuration, and scales of a float8 cache and
of activations, which mgpu does not quantize by them."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor under its Hugging Face name; ``shape`` is row-major (out, in), ``offset`` is in ``file``.

    ``dtype`` is the safetensors name (F32, F16, BF16) or the GGUF type (Q4_1, …). ``file`` is empty for a
    synthesized (dummy) tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    row_step: int = 1
    """Rows of the file from one row of the tensor to the next: 2 where gate and up rows take turns."""
    is_transposed: bool = False
    """True if the file holds (in, out): ``row_step`` then counts its columns, and ``shape`` is still (out, in)."""
    stored_columns: int = 0
    """Columns of a row in the file, if it is transposed."""
    packed: "PackedParts | None" = None
    """The stored tensors of which this one consists, if it is packed. ``offset`` then means nothing."""
    joined: "tuple[TensorEntry, ...]" = ()
    """Tensors whose rows are this one's, one after the other, if its rows lie in several places of the file."""


Packing = Literal["rows", "words", "gptq", "awq", "mxfp4", "gguf"]
"""How the values of a packed matrix [outputs, inputs] lie in the file, see `worker/loaders/unpack.py`."""


@dataclass(frozen=True, slots=True)
class PackedParts:
    """What a packed matrix of a checkpoint is made of, and the format in which a rank holds it."""

    form: WeightFormat
    packing: Packing
    bits: int
    values: TensorEntry
    scales: TensorEntry
    """The blocks themselves in GGUF files, whose rows are uint8."""
    zeros: TensorEntry | None = None
    order: TensorEntry | None = None
    """The group of each input."""
    block_rows: int = 1
    """Outputs that share a scale."""
    zero_bias: int = 0
    """Added to stored zero points: 1 in GPTQ's first version."""
    first_row: int = 0
    row_step: int = 1
    """Row i of the matrix is row ``first_row + i * row_step`` of what is stored."""

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        parts = self.values, None if self.packing == "gguf" else self.scales, self.zeros, self.order
        return tuple(part for part in parts if part is not None)


def rows_of(entry: TensorEntry, first_row: int, rows: int) -> TensorEntry:
    """Return some rows of a stored tensor, all of whose dimensions but the last count as rows, as a matrix."""
    if entry.packed is not None:
        parts = replace(entry.packed, first_row=entry.packed.first_row + first_row)
        row_bytes = entry.nbytes // math.prod(entry.shape[:-1])
        offset = entry.offset + first_row * row_bytes
        return replace(entry, shape=(rows, entry.shape[-1]), offset=offset, nbytes=rows * row_bytes, packed=parts)
    row_bytes = entry.nbytes // math.prod(entry.shape[:-1])
    shape, offset = (rows, entry.shape[-1]), entry.offset + first_row * row_bytes
    return replace(entry, shape=shape, offset=offset, nbytes=rows * row_bytes)


def join_rows(parts: Sequence[TensorEntry]) -> TensorEntry:
    """Return a tensor that has the rows of others, one after the other. They have one type and one format."""
    if len(parts) == 1:
        return parts[0]
    shape = sum(part.shape[0] for part in parts), *parts[0].shape[1:]
    return replace(parts[0], shape=shape, nbytes=sum(part.nbytes for part in parts), joined=tuple(parts))


def elements_of(entry: TensorEntry, order: Sequence[int]) -> TensorEntry:
    """Return a vector with the elements of a stored one in another order."""
    size = entry.nbytes // len(order)
    return join_rows([replace(entry, shape=(1,), offset=entry.offset + at * size, nbytes=size) for at in order])


def check_shape(entry: TensorEntry, expected: tuple[int, ...]) -> None:
    """Raise CheckpointError if a stored tensor has another shape."""
    if entry.shape != expected:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, the configuration asks for "
            f"{list(expected)}"
        )


def expected_tensors(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the model with its whole (unsplit) shape, in layer order."""
    hidden = facts.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (facts.vocab_size, hidden)}
    for layer in range(facts.num_layers):
        shapes |= layer_tensors(facts, layer)
    if (per := facts.per_layer) is not None:
        width = facts.num_layers * per.size
        shapes["model.embed_tokens_per_layer.weight"] = (per.vocab_size, width)
        shapes["model.per_layer_model_projection.weight"] = (width, hidden)
        shapes["model.per_layer_projection_norm.weight"] = (per.size,)
    shapes["model.norm.weight"] = (hidden,)
    if not facts.tie_embeddings:
        shapes["lm_head.weight"] = (facts.vocab_size, hidden)
    return shapes


def layer_tensors(facts: ModelFacts, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one decoder layer."""
    head, hidden = f"model.layers.{layer}.", facts.hidden_size
    linear = facts.linear
    if linear is not None and linear.layers[layer]:
        shapes = _linear_tensors(linear, hidden, head + "linear_attn.")
    elif facts.latent is not None:
        shapes = _latent_tensors(facts, facts.latent, head + "self_attn.")
    else:
        shapes = _attention_tensors(facts.of_layer(layer), head + "self_attn.")
    shapes |= _mlp_tensors(facts, layer, head + "mlp.")
    if (experts := facts.experts_of(layer)) is not None and experts.is_branch:
        shapes |= {head + "router.scale": (facts.hidden_size,), head + "router.per_expert_scale": (experts.count,)}
    if (per := facts.per_layer) is not None:
        shapes[head + "per_layer_input_gate.weight"] = (per.size, hidden)
        shapes[head + "per_layer_projection.weight"] = (hidden, per.size)
        shapes[head + "post_per_layer_input_norm.weight"] = (hidden,)
    if facts.layer_scale:
        shapes[head + "layer_scalar"] = (1,)
    return shapes | {head + name + ".weight": (hidden,) for name in layer_norms(facts)}


def _attention_tensors(facts: ModelFacts, attention: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of attention. Where heads have gates, each head's query and gate are tensors of their own."""
    hidden = facts.hidden_size
    q_size, kv_size = facts.num_q_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    shapes: dict[str, tuple[int, ...]] = {attention + "o_proj.weight": (hidden, q_size)}
    if facts.has_own_keys:
        shapes[attention + "k_proj.weight"] = (kv_size, hidden)
    if facts.has_own_keys and not facts.keys_are_values:
        shapes[attention + "v_proj.weight"] = (kv_size, hidden)
    if facts.attention_gate:
        heads = [f"{part}.{index}" for index in range(facts.num_q_heads) for part in ("q_proj", "q_gate")]
        shapes |= {f"{attention}{name}.weight": (facts.head_dim, hidden) for name in heads}
    else:
        shapes[attention + "q_proj.weight"] = (q_size, hidden)
    if facts.qkv_bias:
        shapes[attention + "q_proj.bias"] = (q_size,)
        shapes[attention + "k_proj.bias"] = shapes[attention + "v_proj.bias"] = (kv_size,)
    if facts.output_bias:
        shapes[attention + "o_proj.bias"] = (hidden,)
    if facts.qk_norm:
        whole = facts.norms_whole_heads
        shapes[attention + "q_norm.weight"] = (q_size if whole else facts.head_dim,)
        if facts.has_own_keys:
            shapes[attention + "k_norm.weight"] = (kv_size if whole else facts.head_dim,)
    if facts.attention_sinks:
        shapes[attention + "sinks"] = (facts.num_q_heads,)
    return shapes


def _latent_tensors(facts: ModelFacts, latent: LatentFacts, prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of latent attention."""
    hidden, heads = facts.hidden_size, facts.num_q_heads
    shapes: dict[str, tuple[int, ...]] = {
        prefix + "kv_a_proj_with_mqa.weight": (latent.width, hidden),
        prefix + "kv_a_layernorm.weight": (latent.rank,),
        prefix + "o_proj.weight": (hidden, facts.out_inputs),
    }
    if latent.keys_apart:
        shapes[prefix + "k_b_proj.weight"] = (heads * latent.rank, latent.plain)
        shapes[prefix + "v_b_proj.weight"] = (heads * latent.value_dim, latent.rank)
    else:
        shapes[prefix + "kv_b_proj.weight"] = (heads * (latent.plain + latent.value_dim), latent.rank)
    if not latent.query_rank:
        return shapes | {prefix + "q_proj.weight": (heads * latent.head_dim, hidden)}
    return shapes | {
        prefix + "q_a_proj.weight": (latent.query_rank, hidden),
        prefix + "q_a_layernorm.weight": (latent.query_rank,),
        prefix + "q_b_proj.weight": (heads * latent.head_dim, latent.query_rank),
    }


def _linear_tensors(linear: LinearFacts, hidden: int, prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of linear attention: one for each head of queries and keys, see hybrid_tensors.py."""
    shared = linear.value_heads // linear.key_heads
    value = shared * linear.value_dim
    rows = {
        "query": linear.key_dim, "key": linear.key_dim, "value": value, "gate": value, "beta": shared, "decay": shared,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}{part}.{head}.weight": (count, hidden)
        for part, count in rows.items()
        for head in range(linear.key_heads)
    }
    return shapes | {
        prefix + "conv1d.weight": (linear.channels(), linear.conv_width),
        prefix + "dt_bias": (linear.value_heads,),
        prefix + "A_log": (linear.value_heads,),
        prefix + "norm.weight": (linear.value_dim,),
        prefix + "out_proj.weight": (hidden, linear.value_heads * linear.value_dim),
    }


def _mlp_tensors(facts: ModelFacts, layer: int, prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a layer's feed-forward network, or of its router and experts."""
    hidden, experts = facts.hidden_size, facts.experts_of(layer)
    if experts is None:
        return _gated_tensors(prefix, hidden, facts.of_layer(layer).intermediate_size, facts.mlp_bias)
    shapes: dict[str, tuple[int, ...]] = {prefix + "gate.weight": (experts.count, hidden)}
    if experts.router_bias:
        shapes[prefix + "gate.bias"] = (experts.count,)
    if experts.choice is not None and experts.choice.has_correction:
        shapes[prefix + "gate.e_score_correction_bias"] = (experts.count,)
    for index in range(experts.count):
        shapes |= _gated_tensors(f"{prefix}experts.{index}.", hidden, experts.width, experts.bias)
    if experts.shared_width:
        shapes |= _gated_tensors(prefix + experts.shared_name, hidden, experts.shared_width, bias=False)
    if experts.shared_gate:
        shapes[prefix + "shared_expert_gate.weight"] = (1, hidden)
    return shapes


def _gated_tensors(prefix: str, hidden: int, width: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }
    if bias:
        shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()}
    return shapes


def without_absent_biases(facts: ModelFacts, names: Collection[str]) -> ModelFacts:
    """Return the facts without kinds of biases of which no file has any: transformers takes them as zero."""

    def has(*projections: str) -> bool:
        return any(name.endswith(tuple(f".{projection}.bias" for projection in projections)) for name in names)

    return replace(
        facts,
        qkv_bias=facts.qkv_bias and has("q_proj", "k_proj", "v_proj"),
        output_bias=facts.output_bias and has("o_proj"),
        mlp_bias=facts.mlp_bias and has("gate_proj", "up_proj", "down_proj"),
    )


def layer_norms(facts: ModelFacts) -> tuple[str, ...]:
    """Name the norms around the two halves of a layer: before each, after each (OLMo), or both (Gemma)."""
    if facts.architecture in ("olmo2", "olmo3"):
        return "post_attention_layernorm", "post_feedforward_layernorm"
    if facts.architecture in ("gemma2", "gemma3", "gemma4"):
        names = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
        if facts.experts is None:
            return names
        return *names, "post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"
    return "input_layernorm", "post_attention_layernorm"


def check_tensors(
    source: str, facts: ModelFacts, tensors: dict[str, TensorEntry], called: Callable[[str], str] = lambda name: name
) -> None:
    """Refuse a checkpoint that lacks a tensor, or has one of the wrong shape or an unsupported type.

    ``called`` turns mgpu's name of a tensor into the one that its file has.
    """
    expected = expected_tensors(facts)
    missing = [*dict.fromkeys(called(name) for name in expected if name not in tensors)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{source}: {len(missing)} of {len(expected)} tensors are missing: {', '.join(missing[:3])}{more}"
        )
    for name, shape in expected.items():
        entry = tensors[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {called(name)!r} has shape {list(entry.shape)}, the configuration asks for "
                f"{list(shape)}"
            )
        if entry.dtype not in BLOCKS and entry.packed is None:
            raise CheckpointError(
                f"{entry.file}: tensor {called(name)!r} is stored as {entry.dtype}; supported: "
                f"{', '.join(sorted(BLOCKS))}"
            )
    _check_no_others(source, facts, expected, tensors, called)


def _check_no_others(
    source: str,
    facts: ModelFacts,
    expected: dict[str, tuple[int, ...]],
    tensors: dict[str, TensorEntry],
    called: Callable[[str], str],
) -> None:
    """Refuse weights inside layers that the family does not have: leaving them out would give wrong answers."""
    extra = [
        called(name)
        for name in tensors
        if name not in expected and name.startswith("model.layers.") and not name.endswith(_IGNORED_ENDINGS)
    ]
    if extra:
        experts = f" with {facts.experts.count} experts" if facts.experts is not None else ""
        raise CheckpointError(
            f"{source}: {len(extra)} tensors do not belong to a {facts.architecture} model of {facts.num_layers} "
            f"layers{experts}: {', '.join(map(repr, extra[:3]))}"
        )


def dummy_tensors(facts: ModelFacts) -> dict[str, TensorEntry]:
    """Make entries without a file, for a model whose weights are to be random."""
    dtype, width = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}[facts.checkpoint_dtype]
    return {
        name: TensorEntry(name, dtype, shape, "", 0, math.prod(shape) * width)
        for name, shape in expected_tensors(facts).items()
    }
