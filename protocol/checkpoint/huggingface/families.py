"""The families that mgpu serves: what their classes are called, and the defaults of their configurations."""

from dataclasses import dataclass
from typing import Literal

from mgpu.protocol.model.facts import ARCHITECTURES

Biases = Literal["none", "qkv", "asked", "asked qkv", "asked without output"]
"""Of attention: none, always those of q, k and v, or what the configuration asks for: all four, or q, k and v.

The last two differ in the key that asks: `qkv_bias`, or `attention_bias` as for all four.
"""


@dataclass(frozen=True, slots=True)
class Family:
    """Class defaults of a transformers configuration; None: the key must be present (or follows another)."""

    num_kv_heads: int | None
    head_dim: int | None
    max_position: int
    tie: bool
    bos: int | None
    eos: tuple[int, ...]
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_q_heads: int | None = None
    vocab_size: int | None = None
    theta: float = 1e4
    eps: float = 1e-6
    biases: Biases = "asked"
    has_bias: bool = False
    """Default of the key that asks for biases."""
    mlp_bias: bool = False
    """True if the configuration may ask for biases of the feed-forward network."""
    qk_norm: bool = False
    is_gemma: bool = False
    """Embeddings are scaled, and the gate is a tanh-GELU."""
    is_granite: bool = False
    """The configuration has four multipliers."""


FAMILIES = {
    "llama": Family(None, None, 2048, False, 1, (2,), mlp_bias=True),
    "mistral": Family(8, None, 131072, False, 1, (2,), biases="none"),
    "ministral": Family(8, None, 131072, False, 1, (2,), biases="none"),
    "ministral3": Family(8, 128, 262144, False, 1, (2,), theta=1e6, eps=1e-5, biases="none"),
    "qwen2": Family(32, None, 32768, False, None, (), biases="qkv"),
    "qwen2_5_vl": Family(8, None, 32768, False, 151643, (151645,), theta=1e6, eps=1e-5, biases="qkv"),
    "qwen3": Family(32, 128, 32768, False, None, (), qk_norm=True),
    "gemma2": Family(4, 256, 8192, True, 2, (1,), 2304, 9216, 26, 8, 256000, is_gemma=True),
    "gemma3": Family(4, 256, 131072, True, 2, (1,), 2304, 9216, 26, 8, 262208, theta=1e6, qk_norm=True, is_gemma=True),
    "phi3": Family(None, None, 4096, False, 1, (32000,), eps=1e-5, biases="none"),
    "granite": Family(None, None, 2048, False, 1, (2,), mlp_bias=True, is_granite=True),
    "olmo2": Family(None, None, 2048, False, None, (50279,), eps=1e-5, qk_norm=True),
    "olmo3": Family(None, None, 2048, False, None, (50279,), theta=5e5, eps=1e-5, qk_norm=True),
    "smollm3": Family(4, None, 32768, True, 128000, (128001,), theta=2e6, mlp_bias=True),
    "mixtral": Family(8, None, 131072, False, 1, (2,), theta=1e6, eps=1e-5, biases="none"),
    "qwen2_moe": Family(16, None, 32768, False, None, (), biases="asked qkv", has_bias=True),
    "qwen3_moe": Family(4, None, 32768, False, None, (), qk_norm=True),
    "granitemoe": Family(None, None, 2048, False, 1, (2,), is_granite=True),
    "granitemoeshared": Family(None, None, 2048, False, 1, (2,), is_granite=True),
    "gpt_oss": Family(8, 64, 131072, False, None, (), theta=1.5e5, eps=1e-5, has_bias=True),
    "qwen3_next": Family(2, 256, 32768, False, None, (), 2048, 5632, 48, 16, 151936, biases="none", qk_norm=True),
    "qwen3_5": Family(4, 256, 32768, False, None, (), 4096, 12288, 32, 16, 248320, biases="none", qk_norm=True),
    "qwen3_5_moe": Family(2, 256, 32768, False, None, (), 2048, 512, 40, 16, 248320, biases="none", qk_norm=True),
    "gemma4": Family(
        4, 256, 131072, True, 2, (1,), 2304, 9216, 30, 8, 262144, theta=1e6, biases="none", qk_norm=True, is_gemma=True
    ),
    "glm4_moe": Family(
        8, None, 131072, False, None, (), 4096, 10944, 46, 96, 151552, 1e4, 1e-5, "asked without output"
    ),
    "minimax_m2": Family(
        8, 128, 196608, False, 200034, (200020,), 3072, 1536, 62, 48, 200064, 5e6, biases="none", qk_norm=True
    ),
    "llama4": Family(8, 128, 131072, False, 1, (2,), 5120, 8192, 48, 40, 202048, theta=5e5, eps=1e-5),
    "deepseek_v2": Family(None, None, 2048, False, 1, (2,), 4096, 11008, 32, 32, 102400, biases="none"),
    "deepseek_v3": Family(None, None, 4096, False, 0, (1,), 7168, 18432, 61, 128, 129280, biases="none"),
    "mistral4": Family(None, None, 1048576, False, 1, (2,), 4096, 12288, 36, 32, 131072, biases="none"),
}
CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Mistral3ForConditionalGeneration": "mistral",
    "MinistralForCausalLM": "ministral",
    "Ministral3ForCausalLM": "ministral3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "SmolLM3ForCausalLM": "smollm3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeSharedForCausalLM": "granitemoeshared",
    "GptOssForCausalLM": "gpt_oss",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "Gemma4ForCausalLM": "gemma4",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Llama4ForCausalLM": "llama4",
    "Llama4ForConditionalGeneration": "llama4",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Mistral4ForCausalLM": "mistral4",
}
MODEL_TYPES = {name: name for name in ARCHITECTURES} | {
    "gemma3_text": "gemma3", "gemma4_text": "gemma4", "mistral3": "mistral", "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe", "kimi_k2": "deepseek_v3",
    "llama4_text": "llama4",
}  # fmt: skip
"""Models that only name their type."""
