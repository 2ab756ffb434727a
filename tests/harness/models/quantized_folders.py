"""Random models in the formats of quantized checkpoints, and the same models dense.

Values are drawn, stored by code of its own for each format, and multiplied out one by one for the dense model. Nothing
here is shared with the code that reads them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import expected_tensors

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
SIZES: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256, "vocab_size": 100,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "torch_dtype": "float32",
}  # fmt: skip
"""A llama whose slices are whole groups of 32 for 1, 2 and 4 ranks."""

LATENTS: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
}  # fmt: skip
"""Of a head, 48 rows are stored of both second projections, so ranks begin within blocks of 32."""

Stored = tuple[dict[str, Tensor], Tensor]
"""The tensors of one module, by the ends of their names, and the matrix that they stand for."""
Store = Callable[[torch.Generator, int, int], Stored]
"""(generator, outputs, inputs) -> what is stored."""


@dataclass(frozen=True)
class Format:
    """A way to store matrices, and the configuration that says so."""

    name: str
    config: Mapping[str, object]
    store: Store


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [R, C] along C into int32, the first in the lowest bits."""
    per_word = 32 // bits
    words = torch.zeros((codes.shape[0], -(-codes.shape[1] // per_word)), dtype=torch.int64)
    for column in range(codes.shape[1]):
        words[:, column // per_word] |= codes[:, column].long() << (bits * (column % per_word))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def random_float8(generator: torch.Generator, outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=generator).mul_(60).to(torch.float8_e4m3fn)


def random_scales(generator: torch.Generator, *shape: int, size: float, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape, generator=generator) + 0.5).mul_(size).to(dtype)


def float8_tensor(generator: torch.Generator, outputs: int, inputs: int) -> Stored:
    q, scale = random_float8(generator, outputs, inputs), random_scales(generator, 1, size=2e-3, dtype=torch.float32)
    stored = {"weight": q, "weight_scale": scale.reshape(()), "input_scale": torch.ones(())}
    return stored, q.float() * scale


def float8_channel(generator: torch.Generator, outputs: int, inputs: int) -> Stored:
    q = random_float8(generator, outputs, inputs)
    scales = random_scales(generator, outputs, 1, size=2e-3, dtype=torch.bfloat16)
    return {"weight": q, "weight_scale": scales}, q.float() * scales.float()


def float8_blocks(size: int) -> Store:
    def store(generator: torch.Generator, outputs: int, inputs: int) -> Stored:
        q = random_float8(generator, outputs, inputs)
        scales = random_scales(generator, -(-outputs // size), -(-inputs // size), size=2e-3, dtype=torch.bfloat16)
        dense = q.float()
        for row in range(outputs):
            for block in range(scales.shape[1]):
                dense[row, block * size : (block + 1) * size] *= scales[row // size, block].float()
        return {"weight": q, "weight_scale_inv": scales}, dense

    return store


def int8_channel(generator: torch.Generator, outputs: int, inputs: int) -> Stored:
    q = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scales = random_scales(generator, outputs, 1, size=1.5e-3, dtype=torch.float32)
    return {"weight": q, "weight_scale": scales}, q.float() * scales


def int8_zeros(generator: torch.Generator, outputs: int, inputs: int) -> Stored:
    stored, _ = int8_channel(generator, outputs, inputs)
    zeros = torch.randint(-9, 10, (outputs, 1), generator=generator, dtype=torch.int8)
    return stored | {"weight_zero_point": zeros}, (stored["weight"].float() - zeros.float()) * stored["weight_scale"]


def pack_quantized(bits: int, group: int, zeros: bool = False, order: bool = False) -> Store:
    def store(generator: torch.Generator, outputs: int, inputs: int) -> Stored:
        size = group if group > 0 else inputs
        codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator)
        scales = random_scales(generator, outputs, inputs // size, size=0.2 / (1 << bits), dtype=torch.bfloat16)
        stored = {
            "weight_packed": words_of(codes, bits), "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }  # fmt: skip
        middle = torch.full(scales.shape, 1 << (bits - 1))
        if zeros:
            middle = torch.randint(0, 1 << bits, scales.shape, generator=generator)
            stored["weight_zero_point"] = words_of(middle.T, bits).T.contiguous()
        groups = torch.arange(inputs) // size
        if order:
            groups = groups[torch.randperm(inputs, generator=generator)]
            stored["weight_g_idx"] = groups.to(torch.int32)
        return stored, (codes - middle[:, groups]).float() * scales[:, groups].float()

    return store


def gptq(bits: int, group: int, order: bool = False, version: int = 1) -> Store:
    def store(generator: torch.Generator, outputs: int, inputs: int) -> Stored:
        size = group if group > 0 else inputs
        codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator)
        scales = random_scales(generator, inputs // size, outputs, size=0.2 / (1 << bits))
        zeros = torch.randint(1, 1 << bits, scales.shape, generator=generator)
        groups = torch.arange(inputs) // size
        if order:
            groups = groups[torch.randperm(inputs, generator=generator)]
        stored = {
            "qweight": words_of(codes, bits).T.contiguous(), "scales": scales,
            "qzeros": words_of(zeros - (2 - version), bits), "g_idx": groups.to(torch.int32),
        }  # fmt: skip
        return stored, (codes - zeros[groups].T).float() * scales[groups].T.float()

    return store


def awq(group: int) -> Store:
    def interleaved(codes: Tensor) -> Tensor:
        return words_of(codes.view(len(codes), -1, 8)[:, :, AWQ_PLACES].flatten(1), 4)

    def store(generator: torch.Generator, outputs: int, inputs: int) -> Stored:
        codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
        zeros = torch.randint(0, 16, (inputs // group, outputs), generator=generator)
        scales = random_scales(generator, inputs // group, outputs, size=0.2 / 16)
        groups = torch.arange(inputs) // group
        dense = (codes - zeros[groups]).float() * scales[groups].float()
        return {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales}, dense.T.contiguous()

    return store


def compressed(form: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


_FP8 = {"num_bits": 8, "type": "float"}
_PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FORMATS = {
    each.name: each
    for each in (
        Format("fp8-tensor", {"quant_method": "fp8", "activation_scheme": "static"}, float8_tensor),
        Format("fp8-channel", compressed("float-quantized", strategy="channel", **_FP8), float8_channel),
        Format("fbgemm-fp8", {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, float8_channel),
        Format("fp8-blocks", {"quant_method": "fp8", "weight_block_size": [32, 32]}, float8_blocks(32)),
        Format("int8-channel", compressed("int-quantized", strategy="channel", num_bits=8, type="int"), int8_channel),
        Format(
            "int8-zeros", compressed("int-quantized", strategy="channel", num_bits=8, type="int", symmetric=False),
            int8_zeros,
        ),
        Format("w4a16", compressed("pack-quantized", **_PACKED), pack_quantized(4, 32)),
        Format("w4a16-zeros", compressed("pack-quantized", symmetric=False, **_PACKED), pack_quantized(4, 32, True)),
        Format(
            "w4a16-order", compressed("pack-quantized", actorder="group", **_PACKED), pack_quantized(4, 32, order=True)
        ),
        Format(
            "w8a16", compressed("pack-quantized", num_bits=8, type="int", strategy="channel"), pack_quantized(8, -1)
        ),
        Format("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, gptq(4, 32)),
        Format(
            "gptq-order", {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq(4, 32, True)
        ),
        Format("gptq-8", {"quant_method": "gptq", "bits": 8, "group_size": -1}, gptq(8, -1)),
        Format("gptq-8-groups", {"quant_method": "gptq", "bits": 8, "group_size": 32}, gptq(8, 32)),
        Format(
            "gptq-v2", {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
            gptq(4, 32, version=2),
        ),
        Format("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq(32)),
    )
}  # fmt: skip


def is_matrix(name: str) -> bool:
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight"))


def write_quantized(
    folder: Path,
    how: Format,
    stores: Callable[[str], Store | None] | None = None,
    also: Sequence[str] = (),
    stacked: bool = False,
    **changes: object,
) -> tuple[Path, Path]:
    """Write a random model quantized and dense; return both folders.

    ``stores`` says by name how matrices differ, and ``also`` which others are quantized. ``stacked``: q, k and v are
    one matrix, and so are gate and up.
    """
    quantized, dense = folder / "quantized", folder / "dense"
    config = SIZES | changes
    for each, named in ((quantized, {"quantization_config": how.config}), (dense, {})):
        each.mkdir(parents=True)
        (each / "config.json").write_text(json.dumps(config | named))
    shapes = expected_tensors(read_config_facts(dense))
    if stacked:
        shapes = _stacked(shapes)
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        is_wanted = is_matrix(name) or name in also
        store = (stores(name) if stores else how.store) if is_wanted else None
        if store is None:
            stored[name] = whole[name] = torch.randn(shape, generator=generator).mul_(0.1)
            continue
        parts, whole[name] = store(generator, *shape)
        stored |= {f"{name.removesuffix('.weight')}.{end}": part for end, part in parts.items()}
    save_file(stored, quantized / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, dense / "model.safetensors")
    return quantized, dense


def _stacked(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        for stack, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            for part in parts:
                name = name.replace(f".{part}.", f".{stack}.")
        rows = found.get(name, (0,))[0] if name.endswith(("qkv_proj.weight", "gate_up_proj.weight")) else 0
        found[name] = (rows + shape[0], *shape[1:])
    return found
