"""Say in which format a rank holds each matrix of a quantized checkpoint.

Matrices that are multiplied as one (q, k and v; gate and up; all experts of a layer) are held packed if all of them are
stored in the same format. Else they are dequantized while they are read, and held dense. GGUF files mix types on
purpose, so q, k and v of a layer, and gate and up, are then held one by one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.weight_format import DENSE, LayerFormats, WeightFormat


def layer_formats(facts: ModelFacts, tensors: Mapping[str, TensorEntry]) -> tuple[LayerFormats, ...]:
    """Return the formats of all layers; none if all are dense."""
    if not any(entry.packed for entry in tensors.values()):
        return ()
    return tuple(_formats(facts, layer, tensors) for layer in range(facts.num_layers))


def with_formats(facts: ModelFacts, tensors: Mapping[str, TensorEntry]) -> ModelFacts:
    """Return the facts with the formats of all layers; and of embedding and head, which a GGUF file may have packed."""

    def edge(name: str) -> WeightFormat:
        packed = tensors[name].packed
        return DENSE if packed is None or packed.packing != "gguf" else packed.form

    embedding = edge("model.embed_tokens.weight")
    head = embedding if facts.tie_embeddings else edge("lm_head.weight")
    if (per := facts.per_layer) is not None:
        facts = replace(facts, per_layer=replace(per, form=edge("model.embed_tokens_per_layer.weight")))
    return replace(facts, formats=layer_formats(facts, tensors), embedding_format=embedding, head_format=head)


def _formats(facts: ModelFacts, layer: int, tensors: Mapping[str, TensorEntry]) -> LayerFormats:
    def common(*modules: str) -> WeightFormat:
        return _common(tensors[f"model.layers.{layer}.{module}_proj.weight"] for module in modules)

    def parts(*modules: str) -> tuple[WeightFormat, ...]:
        return _parts([tensors.get(f"model.layers.{layer}.{module}_proj.weight") for module in modules])

    attention = _attention_formats(facts, layer, tensors)
    head = f"model.layers.{layer}."
    is_stepwise = facts.latent is not None and facts.latent.query_rank > 0
    q_b = common("self_attn.q_b") if is_stepwise else DENSE
    qkv_parts = _parts([tensors[f"{head}{name}.weight"] for name in _attention_pieces(facts, layer)])
    experts = facts.experts_of(layer)
    if experts is None:
        gate_up_parts = parts("mlp.gate", "mlp.up")
        dense = common("mlp.gate", "mlp.up"), common("mlp.down")
        return LayerFormats(*attention, *dense, qkv_parts=qkv_parts, gate_up_parts=gate_up_parts, q_b=q_b)
    each = [f"mlp.experts.{index}." for index in range(experts.count)]
    gate_up = common(*(head + part for head in each for part in ("gate", "up")))
    sparse = gate_up, common(*(head + "down" for head in each))
    if not experts.shared_width:
        return LayerFormats(*attention, *sparse, qkv_parts=qkv_parts, q_b=q_b)
    shared = f"mlp.{experts.shared_name}"
    pair = common(f"{shared}gate", f"{shared}up"), common(f"{shared}down")
    return LayerFormats(*attention, *sparse, *pair, qkv_parts, q_b=q_b)


def _attention_pieces(facts: ModelFacts, layer: int) -> list[str]:
    """Return a tensor of each part of the input projection of attention that may have a format of its own."""
    if facts.linear is not None and facts.linear.layers[layer]:
        return ["linear_attn.query.0", "linear_attn.gate.0"]
    if facts.latent is not None:
        return ["self_attn.q_a_proj" if facts.latent.query_rank else "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"]
    keys = [f"self_attn.{part}_proj" for part in facts.of_layer(layer).kv_parts]
    if facts.attention_gate:
        return ["self_attn.q_proj.0", *keys, "self_attn.q_gate.0"]
    return ["self_attn.q_proj", *keys]


def _attention_formats(
    facts: ModelFacts, layer: int, tensors: Mapping[str, TensorEntry]
) -> tuple[WeightFormat, WeightFormat]:
    """Return the formats of the input and the output projection of attention, of either kind."""
    head = f"model.layers.{layer}."
    if facts.linear is not None and facts.linear.layers[layer]:
        parts = [f"{part}.{key}" for key in range(facts.linear.key_heads) for part in ("query", "key", "value", "gate")]
        names, out = [f"linear_attn.{part}" for part in parts], "linear_attn.out_proj"
    elif facts.latent is not None:
        queries = ["q_a_proj" if facts.latent.query_rank else "q_proj"]
        names, out = [f"self_attn.{part}" for part in (*queries, "kv_a_proj_with_mqa")], "self_attn.o_proj"
    else:
        queries = ["q_proj"]
        if facts.attention_gate:
            queries = [f"{part}.{index}" for index in range(facts.num_q_heads) for part in ("q_proj", "q_gate")]
        keys = [f"{part}_proj" for part in facts.of_layer(layer).kv_parts]
        names, out = [f"self_attn.{part}" for part in (*queries, *keys)], "self_attn.o_proj"
    return _common(tensors[f"{head}{name}.weight"] for name in names), _common([tensors[f"{head}{out}.weight"]])


def _common(entries: Iterable[TensorEntry]) -> WeightFormat:
    forms = {DENSE if entry.packed is None else entry.packed.form for entry in entries}
    return forms.pop() if len(forms) == 1 else DENSE


def _parts(entries: Sequence[TensorEntry | None]) -> tuple[WeightFormat, ...]:
    """Return the formats of matrices of a GGUF file that are all packed, but not alike."""
    packed = [entry.packed for entry in entries if entry is not None and entry.packed is not None]
    forms = tuple(parts.form for parts in packed if parts.packing == "gguf")
    return forms if len(forms) == len(entries) and len(set(forms)) > 1 else ()
