"""Tiny whole models in every stored format, as tables of tensors in memory: what the sweep of broken files breaks."""

import json
import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.fuzz.targets.gguf_families import families
from bench.fuzz.targets.model_files import metadata_value, string
from mgpu.protocol.checkpoint.files.gguf_file import GGUF_TYPES
from mgpu.protocol.checkpoint.files.safetensors_file import DTYPE_BYTES
from mgpu.protocol.checkpoint.files.tensors import BLOCKS

HIDDEN, WIDTH, VOCAB = 256, 256, 40
"""Whole blocks of 256, for the K-quants."""
GROUP = 32
_FINITE = bytes(byte % 0x3C for byte in range(256))
"""Below 0x3C all halves and floats are finite, and small."""


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Model:
    """A folder, or a GGUF file if it has metadata. ``parts``: of how many files it consists."""

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 1

    @property
    def is_gguf(self) -> bool:
        return bool(self.metadata)

    def with_tensor(self, name: str, tensor: Tensor | None) -> "Model":
        """Return the model with one tensor replaced, or without it."""
        changed = {**self.tensors, **({} if tensor is None else {name: tensor})}
        return replace(self, tensors={key: each for key, each in changed.items() if tensor is not None or key != name})


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    block, size = BLOCKS.get(dtype) or (1, DTYPE_BYTES[dtype])
    return max(0, math.prod(shape)) * size // block


def made(seed: random.Random, dtype: str, *shape: int) -> Tensor:
    """Return a tensor of small random numbers."""
    return Tensor(dtype, shape, seed.randbytes(bytes_of(dtype, shape)).translate(_FINITE))


# -- folders --

Store = Callable[[random.Random, int, int], dict[str, Tensor]]
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "torch_dtype": "float32",
}  # fmt: skip
_MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN), "mlp.down_proj": (HIDDEN, WIDTH),
}  # fmt: skip
DOWN = "model.layers.0.mlp.down_proj."


def _groups(inputs: int, order: random.Random | None = None) -> Tensor:
    groups = [index // GROUP for index in range(inputs)]
    if order is not None:
        order.shuffle(groups)
    return Tensor("I32", (inputs,), struct.pack(f"<{inputs}i", *groups))


def _gptq(bits: int, ordered: bool = False) -> Store:
    def store(seed: random.Random, rows: int, columns: int) -> dict[str, Tensor]:
        groups, per_word = columns // GROUP, 32 // bits
        return {
            "qweight": made(seed, "I32", columns // per_word, rows), "scales": made(seed, "F16", groups, rows),
            "qzeros": made(seed, "I32", groups, rows // per_word), "g_idx": _groups(columns, seed if ordered else None),
        }  # fmt: skip

    return store


def _awq(seed: random.Random, rows: int, columns: int) -> dict[str, Tensor]:
    groups = columns // GROUP
    return {
        "qweight": made(seed, "I32", columns, rows // 8), "qzeros": made(seed, "I32", groups, rows // 8),
        "scales": made(seed, "F16", groups, rows),
    }  # fmt: skip


def _rows(dtype: str, scale: str = "F32") -> Store:
    return lambda seed, rows, columns: {
        "weight": made(seed, dtype, rows, columns), "weight_scale": made(seed, scale, rows, 1)
    }  # fmt: skip


def _scalar(seed: random.Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {"weight": made(seed, "F8_E4M3", rows, columns), "weight_scale": made(seed, "F32")}


def _blocks(seed: random.Random, rows: int, columns: int) -> dict[str, Tensor]:
    scales = made(seed, "F32", rows // 64, columns // 64)
    return {"weight": made(seed, "F8_E4M3", rows, columns), "weight_scale_inv": scales}


def _words(seed: random.Random, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "weight_packed": made(seed, "I32", rows, columns // 8), "weight_scale": made(seed, "BF16", rows, 8),
        "weight_zero_point": made(seed, "I32", rows // 8, 8),
        "weight_shape": Tensor("I64", (2,), struct.pack("<2q", rows, columns)),
    }  # fmt: skip


def _compressed(form: str, **weights: object) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "checkpoint_format": "gptq"}
_FORMATS: dict[str, tuple[dict[str, Any], Store]] = {
    "gptq-4": (_GPTQ, _gptq(4)),
    "gptq-4 in act-order": (_GPTQ | {"desc_act": True}, _gptq(4, True)),
    "gptq-8": (_GPTQ | {"bits": 8}, _gptq(8)),
    "gptq-8 in act-order": (_GPTQ | {"bits": 8, "desc_act": True}, _gptq(8, True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, _awq),
    "W8A8": (_compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), _rows("I8")),
    "W8A8 fp8": (
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
        _rows("F8_E4M3", "BF16"),
    ),
    "W4A16": (
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False),
        _words,
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, _scalar),
    "fp8 blocks": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}, _blocks),
}  # fmt: skip


def _folder(name: str, config: dict[str, Any], store: Store) -> Model:
    seed = random.Random(name)
    tensors = {
        "model.embed_tokens.weight": made(seed, "F32", VOCAB, HIDDEN),
        "lm_head.weight": made(seed, "F32", VOCAB, HIDDEN),
        "model.norm.weight": made(seed, "F32", HIDDEN),
        "model.layers.0.input_layernorm.weight": made(seed, "F32", HIDDEN),
        "model.layers.0.post_attention_layernorm.weight": made(seed, "F32", HIDDEN),
    }  # fmt: skip
    for module, shape in _MATRICES.items():
        tensors |= {f"model.layers.0.{module}.{end}": each for end, each in store(seed, *shape).items()}
    return Model(name, tensors, _LLAMA | {"quantization_config": config})


def _gpt_oss() -> Model:
    seed, layer, count = random.Random("mxfp4"), "model.layers.0.", 2
    tensors = {
        "model.embed_tokens.weight": made(seed, "F32", VOCAB, HIDDEN),
        "lm_head.weight": made(seed, "F32", VOCAB, HIDDEN),
        "model.norm.weight": made(seed, "F32", HIDDEN), layer + "input_layernorm.weight": made(seed, "F32", HIDDEN),
        layer + "post_attention_layernorm.weight": made(seed, "F32", HIDDEN),
        layer + "self_attn.sinks": made(seed, "F32", 4), layer + "mlp.router.weight": made(seed, "F32", count, HIDDEN),
        layer + "mlp.router.bias": made(seed, "F32", count),
    }  # fmt: skip
    for module, (rows, columns) in list(_MATRICES.items())[:4]:
        tensors |= {
            f"{layer}{module}.weight": made(seed, "F32", rows, columns),
            f"{layer}{module}.bias": made(seed, "F32", rows),
        }  # fmt: skip
    for part, rows, columns in (("gate_up", 2 * WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
        stem = f"{layer}mlp.experts.{part}_proj"
        tensors |= {
            stem + "_blocks": made(seed, "U8", count, rows, columns // 32, 16),
            stem + "_scales": made(seed, "U8", count, rows, columns // 32),
            stem + "_bias": made(seed, "F32", count, rows),
        }  # fmt: skip
    config = _LLAMA | {
        "architectures": ["GptOssForCausalLM"], "head_dim": 64, "num_local_experts": count, "num_experts_per_tok": 1,
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    return Model("mxfp4", tensors, config)


# -- GGUF --

_METADATA: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64,
    "llama.embedding_length": HIDDEN, "llama.feed_forward_length": WIDTH, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4,
    "tokenizer.ggml.tokens": [f"t{number}" for number in range(VOCAB)], "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
_GGUF_NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
GGUF_DOWN = "blk.0.ffn_down.weight"


def _gguf(name: str, kind: str, parts: int = 1) -> Model:
    seed = random.Random(name)
    tensors = {
        "token_embd.weight": made(seed, kind, VOCAB, HIDDEN), "output_norm.weight": made(seed, "F32", HIDDEN),
        "output.weight": made(seed, kind, VOCAB, HIDDEN), "blk.0.attn_norm.weight": made(seed, "F32", HIDDEN),
        "blk.0.ffn_norm.weight": made(seed, "F32", HIDDEN),
    }  # fmt: skip
    for part, shape in zip(_GGUF_NAMES, _MATRICES.values(), strict=True):
        tensors[f"blk.0.{part}.weight"] = made(seed, kind, *shape)
    return Model(name, tensors, metadata=_METADATA, parts=parts)


def _family(name: str) -> Model:
    """Return a model of an architecture with matrices in Q8_0, and with rates that fade."""
    seed, family = random.Random(name), families(64)[name]
    tensors = {
        tensor: made(seed, "Q8_0" if len(shape) > 1 and shape[-1] % 32 == 0 else "F32", *shape)
        for tensor, shape in family.shapes.items()
    }
    rates = {each: Tensor("F32", (2,), struct.pack("<2f", -1.0, -0.5)) for each in tensors if each.endswith("ssm_a")}
    return Model(f"GGUF {name}", tensors | rates, metadata=family.metadata)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        *(_folder(name, config, store) for name, (config, store) in _FORMATS.items()),
        _gpt_oss(),
        *(_gguf(f"GGUF {kind}", kind) for kind in GGUF_TYPES.values()),
        _gguf("GGUF in two parts", "Q4_0", 2),
        *map(_family, families(64)),
    )
}
"""A model of each format."""


# -- as files --


def write_model(model: Model, folder: Path) -> Path:
    """Write a model into an empty folder and return what a user would name."""
    names = list(model.tensors)
    cuts = [names[part :: model.parts] for part in range(model.parts)]
    if not model.is_gguf:
        (folder / "config.json").write_text(json.dumps(model.config))
        for part, mine in enumerate(cuts, 1):
            data = _safetensors({name: model.tensors[name] for name in mine})
            (folder / f"model-{part:05}-of-{model.parts:05}.safetensors").write_bytes(data)
        return folder
    for part, mine in enumerate(cuts, 1):
        facts = dict(model.metadata) if part == 1 else {}
        facts = {"split.count": model.parts, "split.no": part - 1} | facts if model.parts > 1 else facts
        data = _gguf_bytes(facts, {name: model.tensors[name] for name in mine})
        (folder / f"m-{part:05}-of-{model.parts:05}.gguf").write_bytes(data)
    return folder / f"m-00001-of-{model.parts:05}.gguf"


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        ends = [offset, offset + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values())


def _gguf_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    numbers = {name: number for number, name in GGUF_TYPES.items()}
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    out += b"".join(string(key) + metadata_value(value) for key, value in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        body += bytes(-len(body) % 32)
        dims = struct.pack(f"<{len(tensor.shape)}Q", *(size & (1 << 64) - 1 for size in reversed(tensor.shape)))
        kind = numbers.get(tensor.dtype)
        number = int(tensor.dtype.removeprefix("type ")) if kind is None else kind
        out += string(name) + struct.pack("<I", len(tensor.shape)) + dims + struct.pack("<IQ", number, len(body))
        body += tensor.data
    return out + bytes(-len(out) % 32) + body + bytes(-len(body) % 32)
