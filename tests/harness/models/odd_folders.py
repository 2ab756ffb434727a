"""What is done to model folders so that they are odd, as real ones are."""

import json
import os
import shutil
import struct
from collections.abc import Callable

import torch

from harness.models.odd_models import INDEX, WHOLE, Case, Change, Folder, Tensors
from harness.models.tiny_configs import TINY


def untie(folder: Folder) -> None:
    """Say that the head is tied, though one is stored."""
    folder.config(tie_word_embeddings=True)


def store_head(folder: Folder) -> None:
    """Store a head of its own in a folder of a tied model."""
    tensors = folder.tensors()
    torch.manual_seed(5)
    folder.write(tensors | {"lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"])})


def stale_index(folder: Folder) -> None:
    """Leave the index of shards beside a whole file."""
    folder.write(folder.tensors())
    (folder.path / INDEX).write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}})
    )


def index_of_absent(folder: Folder) -> None:
    """Name constants in the index that nobody needs, and that no file has."""
    one, two = folder.halves()
    absent = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    folder.write(one, two, index=dict.fromkeys(absent, "model-00001-of-00002.safetensors"))


def twice(folder: Folder) -> None:
    """Have a tensor in two shards, with other numbers in the first."""
    one, two = folder.halves()
    name = next(iter(two))
    folder.write(one | {name: torch.zeros_like(two[name])}, two)


def bare_names(folder: Folder) -> None:
    folder.rename(lambda name: name.removeprefix("model."))


def odd_file_names(folder: Folder) -> None:
    one, two = folder.halves()
    folder.write(one, two, names=["weights.part1.safetensors", "pytorch_model-2.safetensors"])


def padded_header(folder: Folder) -> None:
    """Pad the header with spaces, as writers do that align the data."""
    file = folder.path / WHOLE
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(struct.pack("<Q", size + 56) + data[8 : 8 + size] + b" " * 56 + data[8 + size :])


def no_metadata(folder: Folder) -> None:
    """Leave out the header's own metadata."""
    file = folder.path / WHOLE
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def reversed_order(folder: Folder) -> None:
    folder.write(dict(reversed(list(folder.tensors().items()))))


def as_dtype(*kinds: torch.dtype) -> Change:
    """Store tensors in other types, in turns."""

    def change(folder: Folder) -> None:
        numbered = enumerate(sorted(folder.tensors().items()))
        folder.write({name: tensor.to(kinds[number % len(kinds)]) for number, (name, tensor) in numbered})

    return change


def norms_in_float64(folder: Folder) -> None:
    folder.change(lambda name, tensor: tensor.double() if name.endswith("norm.weight") else tensor)


def with_constants(folder: Folder) -> None:
    """Store what old checkpoints store beside the weights: frequencies, and scales of a float8 cache."""
    extra: Tensors = {}
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        extra |= {f"{attention}.rotary_emb.inv_freq": torch.ones(8), f"{attention}.k_scale": torch.ones(1),
                  f"{attention}.v_scale": torch.ones(1)}  # fmt: skip
    folder.write(folder.tensors() | extra)


def without(*ends: str) -> Change:
    """Leave out tensors by the ends of their names."""
    return lambda folder: folder.change(lambda name, tensor: None if name.endswith(ends) else tensor)


def config(**changes: object) -> Change:
    return lambda folder: folder.config(**changes)


def both(*changes: Change) -> Change:
    def change(folder: Folder) -> None:
        for each in changes:
            each(folder)

    return change


def rope(**parameters: object) -> Change:
    """Write rotary parameters in the old style."""
    return config(rope_parameters=..., rope_theta=10000.0, rope_scaling=parameters)


def new_rope(**parameters: object) -> Change:
    return config(rope_parameters={"rope_theta": 10000.0, **parameters}, rope_theta=...)


def in_cache(place: str) -> Change:
    """Lay the folder out as a snapshot of the hub's cache, in a folder below its revision."""

    def change(folder: Folder) -> None:
        blobs, snapshot = folder.path / "blobs", folder.path / place
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted(path for path in folder.path.iterdir() if path.is_file())):
            shutil.move(file, blobs / f"{number:040x}")
            (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))

    return change


def multimodal(rename: Callable[[str], str]) -> Change:
    """Wrap a text model as checkpoints with a vision tower do: nested configuration, longer names."""

    def change(folder: Folder) -> None:
        file = folder.path / "config.json"
        text = json.loads(file.read_text())
        outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
        file.write_text(json.dumps(outer | {"vision_config": {"hidden_size": 8}, "dtype": "float32"}))
        folder.rename(rename)
        folder.write(folder.tensors() | {"vision_tower.patch.weight": torch.ones(8)})

    return change


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
HALF = TINY["hidden_size"] // TINY["num_attention_heads"] // 2
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * HALF, "long_factor": [1.0 + index for index in range(HALF)],
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SNAPSHOT = "snapshots/0123456789abcdef0123456789abcdef01234567"
LAYERS = ["full_attention", "sliding_attention", "full_attention"]

FOLDERS: dict[str, Case] = {
    **{
        f"a stored head beside 'tied', {family}": Case(family, both(store_head, untie))
        for family in ("llama", "mistral-window", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3-moe")
    },
    "a tied head is not stored": Case("llama", without("lm_head.weight"), (("tie_word_embeddings", True),)),
    "'tied' absent where the class default is tied": Case("gemma3", config(tie_word_embeddings=...)),
    "'tied' absent where the class default is untied": Case("qwen3", config(tie_word_embeddings=...)),
    "a stale index": Case("llama", stale_index),
    "an index that names absent constants": Case("llama", index_of_absent),
    "a tensor in two shards": Case("llama", twice),
    "names without model, tied": Case("qwen2", bare_names),
    "shards of other names": Case("llama", odd_file_names),
    "a padded header": Case("llama", both(lambda folder: folder.write(folder.tensors()), padded_header)),
    "a header without metadata": Case("llama", no_metadata, is_stated=True),
    "tensors in another order": Case("qwen3", reversed_order),
    "float16 weights": Case("llama", as_dtype(torch.float16)),
    "bfloat16 weights": Case("qwen2", as_dtype(torch.bfloat16)),
    "mixed types": Case("llama", as_dtype(torch.float32, torch.float16, torch.bfloat16)),
    "float64 weights": Case("llama", as_dtype(torch.float64)),
    "float64 norms": Case("qwen3", norms_in_float64),
    "constants and cache scales": Case("llama", with_constants),
    "attention_bias without o_proj.bias": Case("llama", without("o_proj.bias"), (("attention_bias", True),)),
    "attention_bias without any bias": Case("llama", without(".bias"), (("attention_bias", True),)),
    "mlp_bias": Case("llama", fields=(("mlp_bias", True),)),
    "qwen3 with attention_bias": Case("qwen3", fields=(("attention_bias", True),)),
    "one KV head": Case("llama", fields=(("num_key_value_heads", 1),)),
    "as many KV heads as query heads": Case("qwen2", fields=(("num_key_value_heads", 4),)),
    "KV heads null": Case("llama", config(num_key_value_heads=None), (("num_key_value_heads", 4),)),
    "KV heads absent": Case("llama", config(num_key_value_heads=...), (("num_key_value_heads", 4),)),
    "heads wider than the model": Case("llama", fields=(("head_dim", 32),)),
    "heads narrower than the model, mistral": Case("mistral-window", fields=(("head_dim", 8),)),
    "head_dim null": Case("llama", config(head_dim=None)),
    "an odd MLP width": Case("qwen2", fields=(("intermediate_size", 93),)),
    "one layer": Case("llama", fields=(("num_hidden_layers", 1),)),
    "a vocabulary of one more": Case("llama", fields=(("vocab_size", 102),)),
    "another epsilon": Case("llama", fields=(("rms_norm_eps", 0.01),)),
    "epsilon absent": Case("llama", config(rms_norm_eps=...)),
    "context absent": Case("llama", config(max_position_embeddings=...)),
    "hidden_act swish": Case("llama", config(hidden_act="swish")),
    "type auto": Case("llama", config(dtype="auto", torch_dtype=...), is_stated=True),
    "type absent": Case("llama", config(dtype=..., torch_dtype=...)),
    "type in the old key": Case("llama", config(dtype=..., torch_dtype="float32")),
    "architectures absent": Case("qwen3", config(architectures=...)),
    "BOS of -1": Case("llama", config(bos_token_id=-1), is_stated=True),
    "unknown keys": Case("llama", config(my_key={"a": [1, None]}, transformers_version="9.9.9", pretraining_tp=1)),
    "quantization left over": Case(
        "llama", config(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128}), is_stated=True
    ),
    "no window, mistral": Case("mistral-window", config(sliding_window=None)),
    "window absent, mistral": Case("mistral-window", config(sliding_window=...)),
    "a window of one, mistral": Case("mistral-window", config(sliding_window=1)),
    "window from a layer on, qwen2": Case(
        "qwen2", config(use_sliding_window=True, sliding_window=5, max_window_layers=1, layer_types=...)
    ),
    "window given but not used, qwen2": Case("qwen2", config(use_sliding_window=False, sliding_window=5)),
    "window by layer types, qwen3": Case(
        "qwen3", config(use_sliding_window=True, sliding_window=5, max_window_layers=0, layer_types=LAYERS)
    ),
    "another pattern, gemma3": Case("gemma3", config(layer_types=..., sliding_window_pattern=2)),
    "all layers slide, gemma3": Case("gemma3", config(layer_types=["sliding_attention"] * 3)),
    "old rotary keys, gemma3": Case(
        "gemma3", both(rope(rope_type="linear", factor=2.0), config(rope_theta=5e5, rope_local_base_freq=3e4))
    ),
    "yarn for full attention, gemma3": Case(
        "gemma3",
        config(rope_parameters={"full_attention": {**YARN, "rope_theta": 1e6},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ),
    "theta as an integer": Case("llama", config(rope_parameters=..., rope_theta=500000)),
    "theta inside the scaling": Case(
        "llama", both(rope(rope_type="linear", factor=2, rope_theta=5e4), config(rope_theta=...))
    ),
    "linear, old name": Case("llama", rope(type="linear", factor=3)),
    "dynamic": Case("llama", rope(type="dynamic", factor=4.0)),
    "llama3, old style": Case("llama", rope(**LLAMA3)),
    "llama3, mistral": Case("mistral-window", new_rope(**LLAMA3)),
    "yarn, old style": Case("llama", rope(**YARN)),
    "yarn, oldest name, qwen2": Case("qwen2", rope(type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "yarn, attention factor, qwen3": Case("qwen3", new_rope(**YARN, attention_factor=1.5)),
    "yarn, exact range": Case("llama", new_rope(**YARN, truncate=False, beta_fast=8.0, beta_slow=2.0)),
    "yarn, two scales": Case("llama", new_rope(**YARN, mscale=1.0, mscale_all_dim=0.5)),
    "longrope beyond its first context": Case("llama", rope(**LONG)),
    "longrope within its first context": Case("llama", both(rope(**LONG | {"original_max_position_embeddings": 256}))),
    "no scaling, null": Case("llama", config(rope_parameters=..., rope_theta=10000.0, rope_scaling=None)),
    "a snapshot of the hub's cache": Case("llama", in_cache(SNAPSHOT), is_stated=True, subfolder=SNAPSHOT),
    "a folder below a snapshot": Case(
        "llama", in_cache(SNAPSHOT + "/checkpoint-10"), is_stated=True, subfolder=SNAPSHOT + "/checkpoint-10"
    ),
    "a text model beside a vision tower": Case(
        "gemma3", multimodal(lambda name: "language_model." + name), is_stated=True
    ),
    "a text model beside a vision tower, newer names": Case(
        "gemma3", multimodal(lambda name: name.replace("model.", "model.language_model.", 1)), is_stated=True
    ),
    "window from a layer that is not there, qwen3": Case(
        "qwen3", config(use_sliding_window=True, sliding_window=5, layer_types=..., max_window_layers=...)
    ),
    "shards, tied, float16": Case(
        "gemma3", both(as_dtype(torch.float16), lambda folder: folder.write(*folder.halves()))
    ),
    "two experts, mixtral": Case("mixtral", fields=(("num_local_experts", 2),)),
    "weights of experts not normalized": Case("qwen3-moe", config(norm_topk_prob=False)),
}  # fmt: skip
