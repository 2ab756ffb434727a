"""What the planner and the workers must know of a model, independent of its file format."""

from dataclasses import dataclass
from typing import Literal

CheckpointFormat = Literal["safetensors", "gguf"]
LoadFormat = Literal["auto", "dummy"]
Dtype = Literal["float32", "bfloat16", "float16"]

Activation = Literal["silu", "gelu_tanh"]
"""Of gated feed-forward networks."""

KvCacheDtype = Literal["auto", "fp8"]
"""How keys and values are stored: in the model's dtype, or rounded to float8 (e4m3)."""

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
"""Family names used inside mgpu; protocol/checkpoint maps Hugging Face and GGUF names to them."""


def kv_element_bytes(stored: KvCacheDtype, dtype: Dtype) -> int:
    """Return the bytes of one component of a key or a value in the cache."""
    return 1 if stored == "fp8" else DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary frequencies, by any rule.

    Each of the K / 2 frequencies is divided by its own number of ``divisors``, then cos and sin are multiplied by
    ``attention_factor``. With ``long_divisors`` (LongRoPE) these count instead on a server whose longest request
    exceeds ``original_max_position``: all keys of a cache must be rotated alike.
    """

    divisors: tuple[float, ...]
    attention_factor: float = 1.0
    long_divisors: tuple[float, ...] = ()
    original_max_position: int = 0

    def divisors_for(self, longest: int) -> tuple[float, ...]:
        """Return the divisors on a server whose longest request has so many tokens."""
        return self.long_divisors if self.long_divisors and longest > self.original_max_position else self.divisors


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shape and arithmetic of a decoder-only transformer. All sizes are counts of elements, not bytes."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_local_theta: float | None
    """Theta of the sliding-window layers if it differs (Gemma 3)."""
    rope_scaling: RopeScaling | None
    """For full-attention layers only if ``rope_local_theta`` is set."""
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    """One flag per layer: True if attention sees only the last ``sliding_window`` positions."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    activation: Activation
    embedding_scale: float
    """Factor on the embedding output: sqrt(hidden_size) for Gemma, else 1."""
    attention_scale: float
    """Factor on query-key products: head_dim ** -0.5, or query_pre_attn_scalar ** -0.5."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: Dtype


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the weights are. ``path`` is the model folder, or the GGUF file."""

    path: str
    format: CheckpointFormat
    load_format: LoadFormat = "auto"
