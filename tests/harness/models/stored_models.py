"""Small models in every stored format, each packed and with the same numbers dense."""

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from bench.broken.models import HIDDEN, MODELS, VOCAB, Tensor, made, write_model
from harness.models.model_files import f32, string, u32
from harness.models.odd_gguf import converted, rounded
from harness.models.odd_models import make_model
from harness.models.quantized_folders import FORMATS, LATENTS, SIZES, write_quantized
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.model.weight_format import DENSE

EXPERTS: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "head_dim": 32,
}  # fmt: skip
"""Their slices are whole groups of 32 for 1, 2 and 4 ranks."""
IDS = [5, 30, 17, 3, 14, 21, 8, 29, 20, 11]
"""A prompt for all of them."""
GGUF_ROWS = VOCAB - 3
"""No multiple of 2 or 4: the last rank has padding."""
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
_BLOCK = 256
_WIDE = {
    "attn_q": (4 * _BLOCK, HIDDEN), "attn_k": (_BLOCK, HIDDEN), "attn_v": (_BLOCK, HIDDEN),
    "attn_output": (HIDDEN, 4 * _BLOCK), "ffn_gate": (4 * _BLOCK, HIDDEN), "ffn_up": (4 * _BLOCK, HIDDEN),
    "ffn_down": (HIDDEN, 4 * _BLOCK),
}  # fmt: skip
"""Matrices whose slices are whole blocks of every type for 1, 2 and 4 ranks: 16 heads of 64, 4 of them for keys."""
GGUF_EXPERTS = {
    "mixtral": ("llama", Kind.Q4_1), "qwen2-moe": ("qwen2moe", Kind.Q8_0), "qwen3-moe": ("qwen3moe", Kind.Q4_0),
    "granite-moe-shared": ("granitemoe", Kind.Q5_0), "gpt-oss": ("gpt-oss", Kind.MXFP4),
}  # fmt: skip
_GGUF_SIZES = {
    "head_dim": 32, "intermediate_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """The same model twice."""

    packed: Checkpoint
    plain: Checkpoint


def _folder(format_name: str, changes: Mapping[str, object]) -> Callable[[Path], Stored]:
    def write(folder: Path) -> Stored:
        packed, plain = write_quantized(folder, FORMATS[format_name], **changes)
        return Stored(read_checkpoint(packed), read_checkpoint(plain))

    return write


def widened(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint read so that everything is dense in memory."""
    facts = replace(checkpoint.facts, formats=(), embedding_format=DENSE, head_format=DENSE)
    return replace(checkpoint, facts=facts)


def read_gguf(folder: Path, kind: str, tied: bool = False) -> Checkpoint:
    """Write and read a GGUF file all of whose matrices, embedding and head among them, have one type."""
    model = MODELS[f"GGUF {kind}"]
    heads = {"attention.head_count": 16, "attention.head_count_kv": 4, "attention.key_length": 64}
    sizes = heads | {"attention.value_length": 64, "feed_forward_length": 4 * _BLOCK}
    model = replace(model, metadata={**model.metadata, **{f"llama.{key}": size for key, size in sizes.items()}})
    for part, shape in _WIDE.items():
        name = f"blk.0.{part}.weight"
        model = model.with_tensor(name, made(random.Random(name), kind, *shape))
    for name in ("token_embd.weight", "output.weight"):
        is_left_out = tied and name == "output.weight"
        model = model.with_tensor(name, None if is_left_out else made(random.Random(name), kind, GGUF_ROWS, HIDDEN))
    for name, tensor in model.tensors.items():
        if tensor.dtype == "MXFP4":
            model = model.with_tensor(name, _with_exponents(tensor))
    return read_checkpoint(write_model(model, folder))


def _with_exponents(tensor: Tensor) -> Tensor:
    """Return an MXFP4 tensor whose scales are 2 to the -9 to -5, so that products are neither nothing nor endless."""
    data = bytearray(tensor.data)
    data[::17] = bytes(118 + byte % 5 for byte in data[::17])  # 127 would be 1
    return replace(tensor, data=bytes(data))


def _gguf(kind: str) -> Callable[[Path], Stored]:
    def write(folder: Path) -> Stored:
        packed = read_gguf(folder, kind)
        return Stored(packed, widened(packed))

    return write


def write_gguf_experts(folder: Path, family: str, **sizes: object) -> Stored:
    """Write a GGUF file with experts packed, and with the same numbers in F32."""
    architecture, kind = GGUF_EXPERTS[family]
    parts = converted(make_model(family, **(_GGUF_SIZES | sizes), mlp_only_layers=[]), architecture, Kind.F32)
    if family == "gpt-oss":
        parts.set(scaling_type=string("yarn"), factor=f32(4.0), original=u32(64))
    found = []
    for name, each in zip(("packed", "plain"), rounded(parts, kind), strict=True):
        (folder / f"{name}.gguf").write_bytes(each.data())
        found.append(read_checkpoint(folder / f"{name}.gguf"))
    return Stored(*found)


def write_gguf_experts_in(folder: Path, kind: str) -> Stored:
    """Write a GGUF file with experts all of whose matrices are random blocks of one type."""
    sizes = {"hidden_size": _BLOCK, "moe_intermediate_size": _BLOCK, "head_dim": 64, "mlp_only_layers": []}
    parts = converted(make_model("qwen3-moe", **sizes), "qwen3moe", Kind.F32)
    for name, (shape, _, _) in parts.tensors.items():
        if len(shape) < 2 or shape[-1] % _BLOCK or "ffn_gate_inp" in name:
            continue
        blocks = made(random.Random(name), kind, math.prod(shape[:-1]), shape[-1])
        blocks = _with_exponents(blocks) if kind == "MXFP4" else blocks
        parts.tensors[name] = shape, int(Kind[kind]), blocks.data
    (folder / "packed.gguf").write_bytes(parts.data())
    packed = read_checkpoint(folder / "packed.gguf")
    return Stored(packed, widened(packed))


def _mxfp4(folder: Path) -> Stored:
    """Write a gpt-oss whose experts are blocks of 32 codes with an exponent each."""
    config = SIZES | {
        "architectures": ["GptOssForCausalLM"], "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 128, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    hidden, width, generator = 128, 128, torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (100, hidden), "lm_head": (100, hidden)}
    biases: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        stem = f"model.layers.{layer}."
        shapes |= {stem + name: (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q_proj", hidden), ("k_proj", 64), ("v_proj", 64), ("o_proj", hidden)):
            shapes[f"{stem}self_attn.{name}"], biases[f"{stem}self_attn.{name}"] = (rows, hidden), (rows,)
        shapes[stem + "mlp.router"], biases[stem + "mlp.router"] = (4, hidden), (4,)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.randn(shape, generator=generator) * 0.1 for name, shape in biases.items()}
    tensors["model.norm.weight"] = torch.ones(hidden)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.sinks"] = torch.randn(4, generator=generator)
        for part, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            stem, blocks = f"model.layers.{layer}.mlp.experts.{part}", (4, rows, columns // 32)
            tensors[stem + "_blocks"] = torch.randint(256, (*blocks, 16), generator=generator, dtype=torch.uint8)
            tensors[stem + "_scales"] = torch.randint(118, 123, blocks, generator=generator, dtype=torch.uint8)
            tensors[stem + "_bias"] = torch.randn((4, rows), generator=generator) * 0.1
    save_file(tensors, folder / "model.safetensors")
    packed = read_checkpoint(folder)
    return Stored(packed, widened(packed))


FOLDERS: dict[str, Callable[[Path], Stored]] = {
    **{name: _folder(name, {}) for name in FORMATS},
    **{f"{name} experts": _folder(name, EXPERTS) for name in FORMATS},
    **{f"{name} latents": _folder(name, LATENTS) for name in ("fp8-blocks", "gptq-order")},
    "mxfp4 experts": _mxfp4,
}
GGUF_FILES: dict[str, Callable[[Path], Stored]] = {
    **{f"GGUF {kind}": _gguf(kind) for kind in KINDS},
    **{
        f"GGUF {family} experts": lambda folder, family=family: write_gguf_experts(folder, family)
        for family in GGUF_EXPERTS
    },
}
STORED = FOLDERS | GGUF_FILES
"""By name, what writes a model into an empty folder."""
NOT_CAPTURABLE = ("gptq-order experts", "w4a16-order experts", "gptq-order latents")
"""Plain torch computes experts in act-order on GPUs, and asks on the host how many tokens each has: no CUDA graphs."""
