"""Write small model files by hand, whole or broken, with nothing but the standard library."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgpu.protocol.checkpoint.files.safetensors_file import DTYPE_BYTES
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import expected_tensors

Shapes = Mapping[str, Sequence[int]]

LLAMA_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def safetensors_bytes(shapes: Shapes, dtype: str = "F32", changes: Mapping[str, object] | None = None) -> bytes:
    """Return a file whose tensors are zeros. ``changes`` replaces parts of the descriptions: ``{"name": {...}}``."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    for name, change in (changes or {}).items():
        described = header.get(name)
        if isinstance(change, dict) and isinstance(described, dict):
            header[name] = described | change
        else:
            header[name] = change
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


def write_llama_folder(folder: Path, num_shards: int = 1, config: Mapping[str, object] = LLAMA_CONFIG) -> None:
    """Write a complete tiny model: one file, or shards with an index."""
    write_config(folder, config)
    shapes = expected_tensors(read_config_facts(folder))
    if num_shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(shapes))
        return
    names = list(shapes)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: shapes[name] for name in names[shard::num_shards]}
        (folder / file).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Mapping[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


GgufValue = tuple[int, bytes]
"""Type number and encoded value."""


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> GgufValue:
    return 4, struct.pack("<I", value)


def f32(value: float) -> GgufValue:
    return 6, struct.pack("<f", value)


def string(text: str) -> GgufValue:
    return 8, gguf_string(text)


def string_array(items: Sequence[str]) -> GgufValue:
    return 9, struct.pack("<IQ", 8, len(items)) + b"".join(map(gguf_string, items))


def bool_array(items: Sequence[bool]) -> GgufValue:
    return 9, struct.pack("<IQ", 7, len(items)) + bytes(items)


def int_array(items: Sequence[int]) -> GgufValue:
    return 9, struct.pack(f"<IQ{len(items)}i", 5, len(items), *items)


def gguf_bytes(
    metadata: Mapping[str, GgufValue],
    tensors: Mapping[str, tuple[Sequence[int], int, bytes]],
    alignment: int = 32,
) -> bytes:
    """Return a GGUF file. Tensors are (row-major shape, ggml type number, data)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, (kind, data) in metadata.items():
        out += gguf_string(key) + struct.pack("<I", kind) + data
    body = b""
    for name, (shape, kind, data) in tensors.items():
        body += bytes(-len(body) % alignment)
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += gguf_string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, len(body))
        body += data
    return out + bytes(-len(out) % alignment) + body


LLAMA_METADATA: dict[str, GgufValue] = {
    "general.architecture": string("llama"),
    "llama.block_count": u32(2),
    "llama.context_length": u32(256),
    "llama.embedding_length": u32(64),
    "llama.feed_forward_length": u32(96),
    "llama.attention.head_count": u32(4),
    "llama.attention.head_count_kv": u32(2),
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
    "llama.rope.freq_base": f32(10000.0),
    "tokenizer.ggml.tokens": string_array([f"t{i}" for i in range(100)]),
    "tokenizer.ggml.bos_token_id": u32(1),
    "tokenizer.ggml.eos_token_id": u32(2),
}


def llama_gguf_tensors(qk_norm: bool = False) -> dict[str, tuple[Sequence[int], int, bytes]]:
    """Return the tensors of the tiny model as F32 zeros."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (64,),
            f"blk.{layer}.attn_q.weight": (64, 64),
            f"blk.{layer}.attn_k.weight": (32, 64),
            f"blk.{layer}.attn_v.weight": (32, 64),
            f"blk.{layer}.attn_output.weight": (64, 64),
            f"blk.{layer}.ffn_norm.weight": (64,),
            f"blk.{layer}.ffn_gate.weight": (96, 64),
            f"blk.{layer}.ffn_up.weight": (96, 64),
            f"blk.{layer}.ffn_down.weight": (64, 96),
        }
        if qk_norm:
            shapes |= {f"blk.{layer}.attn_q_norm.weight": (16,), f"blk.{layer}.attn_k_norm.weight": (16,)}
    return {name: (shape, 0, bytes(4 * math.prod(shape))) for name, shape in shapes.items()}
