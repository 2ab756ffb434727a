"""Small whole files to begin with: GGUF with tokenizers of both kinds, safetensors, config.json of each family."""

import json
import struct
from collections.abc import Mapping, Sequence

from bench.fuzz.targets.gguf_families import families

CONFIGS: tuple[dict[str, object], ...] = tuple(
    {
        "architectures": [name], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256,
        "torch_dtype": "float32", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "head_dim": 16, "bos_token_id": 1, "eos_token_id": [2, 3], "sliding_window": 7, "use_sliding_window": True,
        "max_window_layers": 1, "layer_types": ["sliding_attention", "full_attention"], "attention_bias": False,
        "mlp_bias": False, **more,
    }
    for name, more in (
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
        ("MistralForCausalLM", {}),
        ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}),
        ("Qwen3ForCausalLM", {"hidden_act": "silu"}),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 24, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}),
    )
)  # fmt: skip
"""A whole configuration of each family."""

HEADER: dict[str, object] = {
    "model.embed_tokens.weight": {"dtype": "F32", "shape": [10, 4], "data_offsets": [0, 160]},
    "model.norm.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [160, 168]},
}


def safetensors_seeds() -> list[bytes]:
    """Return files; the first byte is the target's own (how much longer the file is)."""
    header = json.dumps(HEADER).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(168)
    return [b"\0" + whole, b"\4" + whole, b"\0" + struct.pack("<Q", 2) + b"{}"]


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(metadata: Mapping[str, object], tensors: Sequence[tuple[str, Sequence[int]]]) -> bytes:
    """Return a GGUF file with tensors of F32 zeros."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    out += b"".join(string(key) + metadata_value(value) for key, value in metadata.items())
    offset = 0
    for name, shape in tensors:
        count = 1
        for size in shape:
            count *= size
        out += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", 0, offset)
        offset += -(-4 * count // 32) * 32
    return out + bytes(-len(out) % 32) + bytes(offset)


def metadata_value(value: object) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if 0 <= value < 1 << 32 else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    assert isinstance(value, list)
    if not value:
        return struct.pack("<IIQ", 9, 4, 0)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    if isinstance(value[0], bool):
        return struct.pack("<IIQ", 9, 7, len(value)) + bytes(value)
    code, kind = ("f", 6) if isinstance(value[0], float) else ("i", 5)
    return struct.pack("<IIQ", 9, kind, len(value)) + struct.pack(f"<{len(value)}{code}", *value)


def byte_level_metadata(pre: str, extra: Sequence[str] = ()) -> dict[str, object]:
    """Return the metadata of a byte-level tokenizer: all bytes, some merges, special and user-defined tokens."""
    from mgpu.orchestrator.gateway.text.detokenizer import byte_level_table

    letters = list(byte_level_table())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("a", "a"), ("aa", "aa"), ("Ġ", "a"), ("Ã", "©")]
    special = ["<|begin_of_text|>", "<|im_start|>", "<|im_end|>", *extra]
    tokens = [*letters, *(left + right for left, right in merges), *special, "  "]
    kinds = [1] * (len(letters) + len(merges)) + [3] * len(special) + [4]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin_of_text|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }  # fmt: skip


def sentence_piece_metadata(add_space_prefix: bool = True) -> dict[str, object]:
    """Return the metadata of a SentencePiece tokenizer: bytes, letters, pieces, control and user-defined tokens."""
    control = ["<unk>", "<s>", "</s>"]
    pieces = [
        "▁",
        "a",
        "b",
        "e",
        "h",
        "l",
        "o",
        "▁h",
        "he",
        "ll",
        "hell",
        "aa",
        "aaaa",
        "▁a",
        "é",
        "中",
        "0",
        "1",
        "\n",
    ]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "▁▁", "<start_of_turn>"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4, 3]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-float(number) for number in range(len(tokens))],
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip


_FACTS: dict[str, object] = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 256, "llama.embedding_length": 4,
    "llama.feed_forward_length": 4, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
}  # fmt: skip
_TENSORS = [
    ("token_embd.weight", (3, 4)), ("output_norm.weight", (4,)), ("blk.0.attn_norm.weight", (4,)),
    ("blk.0.attn_q.weight", (4, 4)), ("blk.0.attn_k.weight", (2, 4)), ("blk.0.attn_v.weight", (2, 4)),
    ("blk.0.attn_output.weight", (4, 4)), ("blk.0.ffn_norm.weight", (4,)), ("blk.0.ffn_gate.weight", (4, 4)),
    ("blk.0.ffn_up.weight", (4, 4)), ("blk.0.ffn_down.weight", (4, 4)),
]  # fmt: skip


def gguf_seeds() -> list[bytes]:
    """Return files; the first byte is the target's own (how much longer the file is)."""
    short: dict[str, object] = {
        "tokenizer.ggml.tokens": ["a", "aa", "</s>"],
        "tokenizer.ggml.merges": ["a a"],
        "tokenizer.ggml.pre": "gpt-2",
    }
    texts = [
        short | {"tokenizer.ggml.model": "gpt2"},
        short | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
                 "tokenizer.ggml.token_type": [1, 3, 3], "tokenizer.ggml.bos_token_id": 1},
        {"rope_freqs.weight": 1, "split.count": 1, "general.alignment": 32, "llama.rope.scaling.type": "linear",
         "llama.rope.scaling.factor": 2.0, "tokenizer.ggml.eos_token_ids": [1, 2],
         "tokenizer.chat_template": "{{ x }}"},
    ]  # fmt: skip
    whole = [b"\0" + gguf(_FACTS | text, _TENSORS) for text in texts]
    whole += [b"\0" + gguf(family.metadata, [*family.shapes.items()]) for family in families(4).values()]
    return [*whole, b"\0" + gguf({}, []), b"\6" + gguf({"a": [1, 2], "b": ["x"]}, [("t", (1, 2))])]


_FAMILY_WORDS = sorted(
    {word.encode() for each in families(4).values() for word in (*each.metadata, *each.shapes)}
    | {name.encode() for name in families(4)}
)
GGUF_WORDS = (
    b"GGUF", *(key.encode() for key in _FACTS), *(name.encode() for name, _ in _TENSORS), *_FAMILY_WORDS,
    b"general.alignment", b"split.count", b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges", b"tokenizer.ggml.scores",
    b"tokenizer.ggml.token_type", b"tokenizer.ggml.model", b"gpt2", b"llama", b"gemma3", b"qwen2",
    b"tokenizer.ggml.pre", b"tokenizer.chat_template", b"rope_freqs.weight", b"output.weight", b"\x08\0\0\0",
    b"\x09\0\0\0", b"\xff" * 8,
)  # fmt: skip
