"""The families that mgpu serves: what their classes are called, and the defaults of their configurations."""

from dataclasses import dataclass

from mgpu.protocol.model.facts import ARCHITECTURES


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


FAMILIES = {
    "llama": Family(None, None, 2048, False, 1, (2,)),
    "mistral": Family(8, None, 131072, False, 1, (2,)),
    "qwen2": Family(32, None, 32768, False, None, ()),
    "qwen3": Family(32, 128, 32768, False, None, ()),
    "gemma3": Family(4, 256, 131072, True, 2, (1,), 2304, 9216, 26, 8, 262208, theta=1e6),
    "mixtral": Family(8, None, 131072, False, 1, (2,), theta=1e6, eps=1e-5),
    "qwen3_moe": Family(4, None, 32768, False, None, ()),
}
CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
MODEL_TYPES = {name: name for name in ARCHITECTURES} | {"gemma3_text": "gemma3"}
