"""The models of these scripts, in the shapes of `mgpu-launch bench`, and small ones to rehearse with.

`--load-format dummy` gives them random weights in place; `write_weights` gives them random weights in a file, for what
must be equal from run to run and layout to layout, or must come from the disk.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mgpu.launch.bench.shapes import LLAMA_8B, LLAMA_70B, QWEN3_30B_A3B, QWEN3_32B, SMALL, TINY, Config, write_config
from mgpu.protocol.checkpoint.files.tensors import TensorEntry
from mgpu.protocol.checkpoint.read import read_checkpoint

SHAPES = {"8B": LLAMA_8B, "32B": QWEN3_32B, "70B": LLAMA_70B}
TINY_FEW_KV: Config = {**TINY, "num_key_value_heads": 2}
"""Above 2 ranks, several of them hold the same KV head."""
_SPARSE: Config = {"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
TINY_EXPERTS: Config = {**QWEN3_30B_A3B, **SMALL, **_SPARSE, "head_dim": 16}
"""Slices and whole experts go evenly over 1, 2, 4 and 8 ranks."""
SMALL_SHAPES: dict[str, Config] = {
    "8B": TINY,
    "32B": {**QWEN3_32B, **SMALL, "num_hidden_layers": 8, "head_dim": 16},
    "70B": {**TINY, "num_hidden_layers": 10},
}

__all__ = [
    "LLAMA_8B",
    "LLAMA_70B",
    "QWEN3_32B",
    "SHAPES",
    "SMALL_SHAPES",
    "TINY",
    "TINY_EXPERTS",
    "TINY_FEW_KV",
    "Config",
    "write_config",
    "write_weights",
]

_POOL_VALUES = 1 << 22
_SHARD_BYTES = 4 << 30
_SAFETENSORS = {"F32": "<f4", "BF16": "<u2"}


def write_weights(folder: Path, config: Config) -> Path:
    """Make a model folder with random weights in F32 or BF16, as the configuration says; the same ones every time.

    Matrices are normal with deviation 0.1, which tells tokens apart; norms are around 1. Values repeat after 4 million.
    """
    write_config(folder, config)
    entries = list(read_checkpoint(folder, "dummy").tensors.values())
    pool = np.random.default_rng(0).standard_normal(_POOL_VALUES, dtype=np.float32)
    names: dict[str, str] = {}
    for number, shard in enumerate(_shards(entries)):
        file = f"model-{number + 1:05}.safetensors"
        with (folder / file).open("wb") as out:
            _write_shard(out, shard, pool)
        names |= {entry.name: file for entry in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def _shards(entries: list[TensorEntry]) -> Iterator[list[TensorEntry]]:
    shard: list[TensorEntry] = []
    for entry in entries:
        if shard and sum(other.nbytes for other in shard) + entry.nbytes > _SHARD_BYTES:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _write_shard(out: BinaryIO, entries: list[TensorEntry], pool: np.ndarray) -> None:
    header, offset = {}, 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header).encode()
    out.write(struct.pack("<Q", len(text)) + text)
    encoded = {is_norm: _encoded(0.3 * pool + 1.0 if is_norm else 0.1 * pool, entries[0].dtype) for is_norm in (0, 1)}
    position = 0
    for entry in entries:
        values = encoded[entry.name.endswith("norm.weight")]
        left = entry.nbytes
        while left:
            piece = values[position : position + left]
            out.write(piece)
            left -= len(piece)
            position = (position + len(piece)) % len(values)


def _encoded(values: np.ndarray, dtype: str) -> memoryview:
    """Return the bytes of values; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        values = (values.view(np.uint32) >> 16).astype(_SAFETENSORS[dtype])
    return memoryview(values.astype(_SAFETENSORS[dtype], copy=False).tobytes())
