"""Small GGUF files of odd but real shapes, converted from random models as llama.cpp's converter does."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from harness.models.model_files import GgufValue, bool_array, f32, gguf_bytes, string, string_array, u32
from harness.models.odd_models import logits_of, make_model

_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp", "block_sparse_moe.router": "ffn_gate_inp", "self_attn.sinks": "attn_sinks",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "post_feedforward_layernorm": "post_ffw_norm",
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}  # fmt: skip
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Stored = tuple[tuple[int, ...], int, bytes]


@dataclass
class Parts:
    """A GGUF file that is being put together. Tensors are (row-major shape, ggml type, bytes)."""

    architecture: str
    metadata: dict[str, GgufValue]
    tensors: dict[str, Stored]
    alignment: int = 32
    version: int = 3

    def set(self, **values: GgufValue | None) -> None:
        """Change keys below the architecture, with _ for a dot; None removes one."""
        for name, value in values.items():
            key = f"{self.architecture}.{_KEYS.get(name, name)}"
            self.metadata.pop(key, None)
            if value is not None:
                self.metadata[key] = value

    def add(self, name: str, values: list[float]) -> None:
        self.tensors[name] = (len(values),), 0, struct.pack(f"<{len(values)}f", *values)

    def data(self) -> bytes:
        data = gguf_bytes(self.metadata, self.tensors, self.alignment)
        return data[:4] + struct.pack("<I", self.version) + data[8:]


_KEYS = {
    "kv_heads": "attention.head_count_kv", "key_length": "attention.key_length",
    "value_length": "attention.value_length",
    "theta": "rope.freq_base", "eps": "attention.layer_norm_rms_epsilon", "context": "context_length",
    "scale_linear": "rope.scale_linear", "scaling_type": "rope.scaling.type", "factor": "rope.scaling.factor",
    "original": "rope.scaling.original_context_length", "attention_factor": "rope.scaling.attn_factor",
    "rotary": "rope.dimension_count", "window": "attention.sliding_window", "beta_fast": "rope.scaling.yarn_beta_fast",
    "feed_forward": "feed_forward_length", "pattern": "attention.sliding_window_pattern",
}  # fmt: skip
Change = Callable[[Parts], None]


@dataclass(frozen=True)
class Case:
    """A family, fields of its configuration, how matrices are stored, and what is done to the file."""

    family: str
    architecture: str
    change: Change = lambda parts: None
    fields: Mapping[str, object] = field(default_factory=dict)
    kind: Kind = Kind.F32
    in_parts: int = 1


def write_case(case: Case, folder: Path) -> tuple[Path, Tensor]:
    """Write the file. Return it (its first part), and the right logits: those of the stored numbers."""
    model = make_model(case.family, **case.fields)
    parts = converted(model, case.architecture, case.kind)
    right = logits_of(model)
    case.change(parts)
    if case.in_parts == 1:
        (folder / "m.gguf").write_bytes(parts.data())
        return folder / "m.gguf", right
    names, metadata = list(parts.tensors), parts.metadata
    for part in range(case.in_parts):
        number = {"split.count": (2, struct.pack("<H", case.in_parts)), "split.no": (2, struct.pack("<H", part))}
        parts.metadata = {**(metadata if part == 0 else {}), **number}
        own = Parts(parts.architecture, parts.metadata, {n: parts.tensors[n] for n in names[part :: case.in_parts]})
        (folder / f"m-{part + 1:05}-of-{case.in_parts:05}.gguf").write_bytes(own.data())
    return folder / f"m-00001-of-{case.in_parts:05}.gguf", right


@torch.inference_mode()
def converted(model: Any, architecture: str, kind: Kind) -> Parts:
    """Return the parts of the file of a model, whose matrices are rounded as they are stored."""
    config, tensors = model.config, {}
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and tied:
            continue
        if (stacks := _stacks(name, parameter, architecture)) is not None:
            for stack, values in stacks.items():
                data = values.contiguous().numpy().astype("<f4").tobytes()
                tensors[stack] = tuple(values.shape), int(Kind.F32), data
            continue
        stored = kind if parameter.ndim == 2 and parameter.shape[1] % 32 == 0 else Kind.F32
        shape = tuple(parameter.shape)
        if stored == Kind.F32:
            values = parameter + 1 if "gemma" in architecture and name.endswith("norm.weight") else parameter
            rows = _interleaved(name, values, config, architecture)
            tensors[_name(name, architecture)] = shape, int(stored), rows.numpy().astype("<f4").tobytes()
            continue
        rows = _interleaved(name, parameter, config, architecture).contiguous().numpy()
        data = gguf.quants.quantize(rows, stored)
        back = torch.from_numpy(np.array(gguf.quants.dequantize(data, stored))).reshape(shape)
        parameter.copy_(_straight(name, back, config, architecture))
        tensors[_name(name, architecture)] = shape, int(stored), data.tobytes()
    return Parts(architecture, _metadata(config, architecture), tensors)


def _name(name: str, architecture: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if kind == "sinks":
        stem, kind = name, "weight"
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    names = _LAYER_NAMES | (_GEMMA_NAMES if "gemma" in architecture else {})
    if architecture in ("olmo2", "gpt-oss"):
        names |= {"post_attention_layernorm": "post_attention_norm"}
    return f"blk.{layer}.{names[part]}.{kind}"


def _stacks(name: str, values: Tensor, architecture: str) -> dict[str, Tensor] | None:
    """Return the stacks that the converter makes of the experts of a layer, by their names; None for others."""
    if ".experts." not in name and "_mlp." not in name and "linear.weight" not in name and "expert_gate" not in name:
        return None
    head, last = f"blk.{name.split('.')[2]}.ffn_", name.removesuffix(".weight").rsplit(".", 1)[1]
    if last == "shared_expert_gate":
        return {f"{head}gate_inp_shexp.weight": values.squeeze()}
    if architecture == "gpt-oss":
        end = "bias" if last.endswith("_bias") else "weight"
        values = values if end == "bias" else values.transpose(1, 2)
        if last.startswith("down"):
            return {f"{head}down_exps.{end}": values}
        return {f"{head}gate_exps.{end}": values[:, ::2], f"{head}up_exps.{end}": values[:, 1::2]}
    kind = "shexp" if "shared_mlp" in name else "exps"
    if last in ("down_proj", "output_linear"):
        return {f"{head}down_{kind}.weight": values}
    if last not in ("gate_up_proj", "input_linear"):
        return None
    gate, up = values.chunk(2, dim=-2)
    return {f"{head}gate_{kind}.weight": gate, f"{head}up_{kind}.weight": up}


def _heads_of(name: str, config: Any, architecture: str) -> int:
    """Return the heads whose rows the converter reorders; 0: it does not."""
    if architecture not in ("llama", "granite", "granitemoe", "smollm3"):
        return 0
    return config.num_attention_heads if "q_proj" in name else config.num_key_value_heads if "k_proj" in name else 0


def _interleaved(name: str, rows: Tensor, config: Any, architecture: str) -> Tensor:
    heads = _heads_of(name, config, architecture)
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape) if heads else rows


def _straight(name: str, rows: Tensor, config: Any, architecture: str) -> Tensor:
    heads = _heads_of(name, config, architecture)
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape) if heads else rows


def _metadata(config: Any, architecture: str) -> dict[str, GgufValue]:
    values: dict[str, GgufValue] = {
        "block_count": u32(config.num_hidden_layers), "embedding_length": u32(config.hidden_size),
        "feed_forward_length": u32(config.intermediate_size), "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": u32(config.num_key_value_heads), "context_length": u32(256),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps), "rope.freq_base": f32(10000.0),
    }  # fmt: skip
    values |= _expert_metadata(config)
    for key, name in _GRANITE.items() if "granite" in architecture else ():
        values[key] = f32(getattr(config, name))
    if getattr(config, "head_dim", None):
        values |= {"attention.key_length": u32(config.head_dim), "attention.value_length": u32(config.head_dim)}
    if architecture == "gemma2":
        values |= {"attn_logit_softcapping": f32(config.attn_logit_softcapping),
                   "final_logit_softcapping": f32(config.final_logit_softcapping)}  # fmt: skip
    if architecture in ("gemma2", "gpt-oss", "phi3", "olmo2") and getattr(config, "sliding_window", None):
        values |= {"attention.sliding_window": u32(config.sliding_window)}
    elif "gemma" in architecture:
        values |= {"attention.sliding_window": u32(config.sliding_window), "rope.freq_base": f32(1e6)}
    top = {"general.architecture": string(architecture), "tokenizer.ggml.model": string("gpt2"),
           "tokenizer.ggml.tokens": string_array([f"t{number}" for number in range(config.vocab_size)])}  # fmt: skip
    return top | {f"{architecture}.{key}": value for key, value in values.items()}


_GRANITE = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip


def _expert_metadata(config: Any) -> dict[str, GgufValue]:
    count = getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0)
    if not count:
        return {}
    values = {"expert_count": u32(count), "expert_used_count": u32(config.num_experts_per_tok)}
    for key, name in (("", "moe"), ("shared_", "shared_expert"), ("shared_", "shared")):
        if width := getattr(config, f"{name}_intermediate_size", None):
            values[f"expert_{key}feed_forward_length"] = u32(width)
    return values


def rounded(parts: Parts, kind_of: Kind | Callable[[str], Kind]) -> tuple[Parts, Parts]:
    """Return the file with its matrices stored as one kind, or each as its own, and with the same numbers in F32."""
    packed, plain = dict(parts.tensors), dict(parts.tensors)
    for name, (shape, _, data) in parts.tensors.items():
        kind = kind_of if isinstance(kind_of, Kind) else kind_of(name)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if len(shape) < 2 or shape[-1] % block or "ffn_gate_inp" in name or name.endswith("bias"):
            continue
        values = np.frombuffer(data, "<f4").reshape(shape)
        rows = gguf.quants.quantize(values, kind)
        back = np.ascontiguousarray(gguf.quants.dequantize(rows, kind), "<f4")
        packed[name], plain[name] = (shape, int(kind), rows.tobytes()), (shape, 0, back.tobytes())
    return replace(parts, tensors=packed), replace(parts, tensors=plain)


# -- what is done to files --


def parts_set(**values: GgufValue | None) -> Change:
    return lambda parts: parts.set(**values)


def all_of(*changes: Change) -> Change:
    def change(parts: Parts) -> None:
        for each in changes:
            each(parts)

    return change


def stored(name: str, values: list[float]) -> Change:
    return lambda parts: parts.add(name, values)


def reversed_order(parts: Parts) -> None:
    parts.tensors = dict(reversed(parts.tensors.items()))


def with_alignment(bytes_: int) -> Change:
    def change(parts: Parts) -> None:
        parts.alignment = bytes_
        parts.metadata["general.alignment"] = u32(bytes_)

    return change


def with_version_2(parts: Parts) -> None:
    parts.version = 2


def with_arrays(parts: Parts) -> None:
    """Add metadata that nobody needs, of every shape."""
    inner = struct.pack("<IQ", 4, 2) + struct.pack("<2I", 1, 2)
    parts.metadata |= {
        "general.tags": string_array(["a", "b"]),
        "general.nested": (9, struct.pack("<IQ", 9, 2) + inner * 2),
        "general.empty": (9, struct.pack("<IQ", 8, 0)),
        "general.ratio": (12, struct.pack("<d", 0.5)),
    }


def with_unused_tensor(parts: Parts) -> None:
    parts.add("some_statistics.weight", [0.0] * 8)


def tokens_fewer(parts: Parts) -> None:
    """List fewer tokens than the embedding has rows: it is padded."""
    parts.metadata["tokenizer.ggml.tokens"] = string_array([f"t{number}" for number in range(90)])


def rope_of(**parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


def llama3_stored() -> list[float]:
    from mgpu.protocol.checkpoint.rope.rules import llama3_divisors

    return list(llama3_divisors(8.0, 1.0, 4.0, 32, 1e4, 16))


LLAMA3 = rope_of(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LINEAR = rope_of(rope_type="linear", factor=4.0)
YARN = rope_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LONG = [1.0 + index for index in range(8)]
LONGROPE = rope_of(
    rope_type="longrope", short_factor=[1.0] * 8, long_factor=LONG, original_max_position_embeddings=16,
    attention_factor=1.25,
)  # fmt: skip
YARN_KEYS = {"scaling_type": string("yarn"), "factor": f32(4.0), "original": u32(64)}
GEMMA = {"layer_types": ["sliding_attention"] * 3, "query_pre_attn_scalar": 32}
"""Every sixth layer sees everything, so that none of three does; GGUF has no other scale."""
GEMMA_ROPE = {"rope_parameters": {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}}  # fmt: skip

FILES: dict[str, Case] = {
    "llama": Case("llama", "llama"),
    "mistral": Case("mistral-window", "llama", fields={"sliding_window": None}),
    "qwen2": Case("qwen2", "qwen2"),
    "qwen3": Case("qwen3", "qwen3"),
    "gemma3": Case("gemma3", "gemma3", fields=GEMMA | GEMMA_ROPE),
    "gemma2": Case("gemma2", "gemma2", fields={"query_pre_attn_scalar": 32}),
    "qwen2vl": Case("qwen2", "qwen2vl"),
    "phi3": Case("phi3", "phi3"),
    "phi4-mini": Case(
        "phi4-mini", "phi3",
        all_of(parts_set(rotary=u32(24), original=u32(256), attention_factor=f32(1.0)),
               stored("rope_factors_short.weight", [1.0 + 0.1 * at for at in range(12)]),
               stored("rope_factors_long.weight", [2.0 + at for at in range(12)])),
    ),
    "granite": Case("granite", "granite"),
    "olmo2": Case("olmo2", "olmo2"),
    "olmo3": Case("olmo3", "olmo2", parts_set(pattern=bool_array([True, True, False]), theta=f32(5e5))),
    "smollm3": Case(
        "smollm3", "smollm3", parts_set(theta=f32(2e6)),
        fields={"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4},
    ),
    "mixtral": Case("mixtral", "llama", parts_set(theta=f32(1e6))),
    "qwen2moe": Case("qwen2-moe", "qwen2moe", fields={"mlp_only_layers": []}),
    "qwen3moe": Case("qwen3-moe", "qwen3moe"),
    "granitemoe": Case("granite-moe", "granitemoe"),
    "granitemoe, shared": Case("granite-moe-shared", "granitemoe"),
    "gpt-oss": Case(
        "gpt-oss", "gpt-oss", parts_set(scaling_type=string("yarn"), factor=f32(4.0), original=u32(64)),
        fields={"swiglu_limit": 7.0},
    ),
    **{f"llama in {kind.name}": Case("llama", "llama", kind=kind)
       for kind in (Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)},
    "qwen3 in Q8_0": Case("qwen3", "qwen3", kind=Kind.Q8_0),
    "gemma3 in F16": Case("gemma3", "gemma3", fields=GEMMA | GEMMA_ROPE, kind=Kind.F16),
    "tied": Case("llama", "llama", fields={"tie_word_embeddings": True}),
    "untied, qwen2": Case("qwen2", "qwen2", fields={"tie_word_embeddings": False}),
    "biases of all": Case("llama-linear-bias", "llama", parts_set(factor=f32(4.0))),
    "one KV head": Case("llama", "llama", fields={"num_key_value_heads": 1}),
    "KV heads absent": Case("llama", "llama", parts_set(kv_heads=None), {"num_key_value_heads": 4}),
    "wide heads": Case("llama", "llama", fields={"head_dim": 32}),
    "head sizes absent": Case("llama", "llama", parts_set(key_length=None, value_length=None)),
    "rotary size given": Case("llama", "llama", parts_set(rotary=u32(16))),
    "another theta": Case("llama", "llama", parts_set(theta=f32(5e5)), rope_of(rope_type="default", rope_theta=5e5)),
    "theta absent": Case("llama", "llama", parts_set(theta=None)),
    "another epsilon": Case("llama", "llama", fields={"rms_norm_eps": 0.01}),
    "context absent": Case("llama", "llama", parts_set(context=None)),
    "alignment of 64": Case("llama", "llama", with_alignment(64)),
    "alignment of 8": Case("llama", "llama", with_alignment(8)),
    "version 2": Case("llama", "llama", with_version_2),
    "odd metadata": Case("llama", "llama", with_arrays),
    "a tensor that nobody needs": Case("llama", "llama", with_unused_tensor),
    "tensors in another order": Case("qwen3", "qwen3", reversed_order),
    "fewer tokens than rows": Case("llama", "llama", tokens_fewer),
    "two parts": Case("llama", "llama", in_parts=2),
    "five parts, qwen3": Case("qwen3", "qwen3", in_parts=5, kind=Kind.Q8_0),
    "linear": Case("llama", "llama", parts_set(scaling_type=string("linear"), factor=f32(4.0)), LINEAR),
    "linear, old key": Case("qwen2", "qwen2", parts_set(scale_linear=f32(4.0)), LINEAR),
    "a factor of none": Case("llama", "llama", parts_set(scaling_type=string("none"), factor=f32(4.0))),
    "a factor of 0": Case("llama", "llama", parts_set(factor=f32(0.0))),
    "yarn": Case("llama", "llama", parts_set(**YARN_KEYS), YARN),
    "yarn, qwen3": Case("qwen3", "qwen3", parts_set(**YARN_KEYS), YARN),
    "yarn, betas": Case(
        "qwen2", "qwen2", parts_set(**YARN_KEYS, beta_fast=f32(4.0)),
        rope_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0),
    ),
    "yarn, attention factor": Case(
        "llama", "llama", parts_set(**YARN_KEYS, attention_factor=f32(0.5)),
        rope_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=64,
                attention_factor=0.5 * (1 + 0.1 * float(np.log(4.0)))),
    ),
    "stored divisors of Llama 3.1": Case("llama", "llama", stored("rope_freqs.weight", llama3_stored()), LLAMA3),
    "stored divisors of one": Case("llama", "llama", stored("rope_freqs.weight", [1.0] * 8)),
    "stored divisors in two parts": Case(
        "llama", "llama", stored("rope_freqs.weight", llama3_stored()), LLAMA3, in_parts=2
    ),
    "longrope": Case(
        "llama", "llama",
        all_of(parts_set(scaling_type=string("longrope"), original=u32(16), attention_factor=f32(1.25)),
               stored("rope_factors_short.weight", [1.0] * 8), stored("rope_factors_long.weight", LONG)),
        LONGROPE,
    ),
}  # fmt: skip
