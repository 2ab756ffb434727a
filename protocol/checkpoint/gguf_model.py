"""Turn the header of a GGUF file into `ModelFacts` and tensors under their Hugging Face names."""

import re
from pathlib import Path

from mgpu.protocol.checkpoint.files.gguf_file import MAX_HEADER_BYTES, MAX_TENSORS, GgufHeader, GgufTensor, read_gguf
from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields, Limit, checked_file
from mgpu.protocol.checkpoint.gguf_tokens import end_tokens
from mgpu.protocol.checkpoint.quantized.gguf import packed_entry
from mgpu.protocol.checkpoint.rope.gguf import Located, read_gguf_rope
from mgpu.protocol.model.facts import Dtype, ModelFacts

_GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_COMMON_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOKENS = "tokenizer.ggml.tokens"


def read_gguf_checkpoint(path: Path) -> tuple[ModelFacts, dict[str, TensorEntry]]:
    """Read facts and tensor index of a GGUF model. CheckpointError when it cannot be served."""
    header = read_gguf(path, with_arrays=False, kept=(_TOKENS,))
    fields = Fields(str(path), header.metadata)
    others = _other_parts(path, fields)
    architecture = fields.text("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        raise CheckpointError(
            f"{path}: the architecture is {architecture[:80]!r}; "
            f"supported in GGUF files: {', '.join(_GGUF_ARCHITECTURES)}"
        )
    located = _all_tensors(path, header, others)
    tensors = {name: tensor for name, (_, tensor) in located.items()}
    facts = _facts(path, architecture, GgufHeader(header.metadata, tensors), located)
    return facts, _entries(architecture, located)


def _all_tensors(path: Path, header: GgufHeader, others: list[Path]) -> Located:
    """Return the tensors of all parts of a model with their files. CheckpointError if the parts do not fit together."""
    located: Located = {}
    nbytes = 0
    for index, part in enumerate((path, *others)):
        found = read_gguf(part, with_arrays=False) if index else header
        nbytes += found.nbytes
        if nbytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{part}: {nbytes} bytes of headers up to this part; at most {MAX_HEADER_BYTES}")
        _check_part(part, found, index, 1 + len(others))
        for name, tensor in found.tensors.items():
            if name in located:
                raise CheckpointError(f"{part}: tensor {name!r} is also in {located[name][0]}")
            located[name] = part, tensor
        if len(located) > MAX_TENSORS:
            raise CheckpointError(f"{part}: {len(located)} tensors up to this part; at most {MAX_TENSORS} are allowed")
    claimed = Fields(str(path), header.metadata).integer("split.tensors.count", len(located), low=0, high=MAX_TENSORS)
    if claimed != len(located):
        raise CheckpointError(f"{path}: split.tensors.count is {claimed}, and all parts have {len(located)} tensors")
    return located


def _check_part(path: Path, header: GgufHeader, index: int, count: int) -> None:
    """Raise CheckpointError for a part of another model, or one whose tensors are not all of its data."""
    fields = Fields(str(path), header.metadata)
    for key, expected in (("split.no", index), ("split.count", count)) if count > 1 else ():
        if (found := fields.integer(key, expected, low=0)) != expected:
            raise fields.error(key, f"is {found}; {expected} was expected in part {index + 1} of {count}")
    if header.trailing_bytes:
        raise CheckpointError(
            f"{path}: {header.trailing_bytes} bytes follow the last tensor: its type is not what the header says, "
            "or the file is corrupt; download it again"
        )


def _entries(architecture: str, located: Located) -> dict[str, TensorEntry]:
    entries = {}
    for file, tensor in located.values():
        name = hugging_face_name(architecture, tensor.name)
        if name is not None:
            entry = TensorEntry(name, tensor.dtype, tensor.shape, str(file), tensor.offset, tensor.nbytes)
            entries[name] = packed_entry(entry)
    return entries


def _other_parts(path: Path, fields: Fields) -> list[Path]:
    """Return the further files of a model that is split over several; ``path`` must be the first."""
    count = fields.integer("split.count", 1, low=0, high=9999)
    if count <= 1:
        return []
    match = re.fullmatch(r"(.*)-00001-of-([0-9]{5})\.gguf", path.name)
    if match is None or int(match[2]) != count:
        raise CheckpointError(
            f"{path}: one of {count} parts of a model; name the first, which ends in -00001-of-{count:05}.gguf"
        )
    return [checked_file(path.parent, f"{match[1]}-{part:05}-of-{count:05}.gguf") for part in range(2, count + 1)]


def hugging_face_name(architecture: str, name: str) -> str | None:
    """Translate a GGUF tensor name. None for a tensor outside the layers that is not needed."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] not in ("weight", "bias"):
        return None
    names = _LAYER_NAMES | (_GEMMA_NORMS if architecture == "gemma3" else _COMMON_NORMS)
    # An unknown part keeps its name, so that `check_tensors` refuses it instead of leaving it out.
    return f"model.layers.{parts[1]}.{names.get(parts[2], parts[2])}.{parts[3]}"


def _facts(path: Path, architecture: str, header: GgufHeader, located: Located) -> ModelFacts:
    fields = Fields(str(path), header.metadata, architecture + ".")
    for key in ("expert_count", "final_logit_softcapping", "attn_logit_softcapping"):
        if fields.raw(key):
            raise fields.error(key, f"is {fields.raw(key)!r}, which is not supported")
    hidden = fields.integer("embedding_length", high=Limit.HIDDEN)
    num_layers = fields.integer("block_count", high=Limit.LAYERS)
    num_q_heads = fields.integer("attention.head_count", high=Limit.HEADS)
    num_kv_heads = fields.integer("attention.head_count_kv", num_q_heads, high=Limit.HEADS)
    if num_q_heads % num_kv_heads:
        raise fields.error("attention.head_count_kv", f"is {num_kv_heads}, which does not divide {num_q_heads}")
    head_dim = _head_dim(fields, hidden, num_q_heads)
    gemma = architecture == "gemma3"
    window, sliding = _sliding(fields, gemma, num_layers)
    theta = fields.number("rope.freq_base", 1e6 if gemma else 1e4)
    context = fields.integer("context_length", 4096, high=Limit.POSITION)
    scaling, context = read_gguf_rope(fields, located, theta, head_dim, context)
    tokenizer = Fields(str(path), header.metadata, "tokenizer.ggml.")
    tensors = header.tensors
    return ModelFacts(
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length", high=8 * Limit.HIDDEN),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_vocab_size(path, tensors),
        max_position=context,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=theta,
        rope_local_theta=fields.number("rope.freq_base_swa", 1e4) if gemma else None,
        rope_scaling=scaling,
        sliding_window=window,
        sliding_layers=sliding,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
        activation="gelu_tanh" if gemma else "silu",
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_scale=_attention_scale(gemma, num_layers, hidden, num_q_heads, head_dim),
        bos_token_id=next(iter(tokenizer.token_ids("bos_token_id")), None),
        eos_token_ids=end_tokens(tokenizer),
        checkpoint_dtype=_dtype(tensors),
    )


def _head_dim(fields: Fields, hidden: int, num_q_heads: int) -> int:
    if not fields.has("attention.key_length") and hidden % num_q_heads:
        raise fields.error("embedding_length", f"is {hidden}, not a multiple of the {num_q_heads} attention heads")
    head_dim = fields.integer("attention.key_length", hidden // num_q_heads, high=Limit.HEAD_DIM)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := fields.integer(key, head_dim)) != head_dim:
            raise fields.error(key, f"is {other}, unlike the head size {head_dim}, which is not supported")
    if head_dim % 2:
        raise fields.error("attention.key_length", f"is {head_dim}; rotary embeddings need an even number")
    return head_dim


def _vocab_size(path: Path, tensors: dict[str, GgufTensor]) -> int:
    """Return the rows of the embedding: the token list may be shorter, and `vocab_size` is often absent."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: the tensor 'token_embd.weight' is missing or not a matrix")
    if embedding.shape[0] > Limit.VOCAB:
        raise CheckpointError(f"{path}: a vocabulary of {embedding.shape[0]} is more than the {Limit.VOCAB} allowed")
    return embedding.shape[0]


def _sliding(fields: Fields, gemma: bool, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    if not gemma or not fields.has("attention.sliding_window"):
        return None, (False,) * num_layers
    window = fields.integer("attention.sliding_window")
    pattern = fields.raw("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        flags = fields.list_of("attention.sliding_window_pattern", bool, num_layers)
        return window, tuple(bool(flag) for flag in flags or ())
    period = fields.integer("attention.sliding_window_pattern", 6)
    return window, tuple((layer + 1) % period != 0 for layer in range(num_layers))


def _attention_scale(gemma: bool, num_layers: int, hidden: int, num_q_heads: int, head_dim: int) -> float:
    # GGUF has no query_pre_attn_scalar; only the 62-layer Gemma 3 27B deviates from the head size.
    width = hidden // num_q_heads if gemma and num_layers == 62 else head_dim
    return float(width**-0.5)


def _dtype(tensors: dict[str, GgufTensor]) -> Dtype:
    """Return the float type of the weights. Quantized ones are meant to be computed in bfloat16."""
    kinds = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) == 2}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds and kinds <= {"F16", "F32"} else "bfloat16"
