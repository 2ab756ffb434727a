"""The architectures of GGUF files that mgpu serves, and what a file of each does not say about itself."""

from collections.abc import Collection
from dataclasses import dataclass

from mgpu.protocol.checkpoint.files.untrusted import Fields

SIGMOID = 2
"""The number of `expert_gating_func` for scores by a sigmoid; 1 is a softmax."""


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """What llama.cpp's code of an architecture takes for granted."""

    family: str
    is_gemma: bool = False
    """Embeddings are scaled, and the gate is a tanh-GELU."""
    period: int = 0
    """Every so manieth layer sees everything, if the file names a window; 0: windows are not read."""
    norms_weights: bool = True
    """The weights of a token's experts are divided by their sum, if the file does not say."""
    theta: float = 1e4


ARCHITECTURES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama"),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma3": GgufFamily("gemma3", is_gemma=True, period=6, theta=1e6),
    "gemma2": GgufFamily("gemma2", is_gemma=True, period=2),
    "gemma4": GgufFamily("gemma4", is_gemma=True, period=6, theta=1e6),
    "mistral3": GgufFamily("ministral3"),
    "mistral4": GgufFamily("mistral4"),
    "qwen2vl": GgufFamily("qwen2_5_vl", theta=1e6),
    "phi3": GgufFamily("phi3", period=1 << 20),
    "granite": GgufFamily("granite"),
    "olmo2": GgufFamily("olmo2", period=4),
    "smollm3": GgufFamily("smollm3"),
    "qwen2moe": GgufFamily("qwen2_moe", norms_weights=False),
    "qwen3moe": GgufFamily("qwen3_moe"),
    "qwen3next": GgufFamily("qwen3_next"),
    "qwen35": GgufFamily("qwen3_5"),
    "qwen35moe": GgufFamily("qwen3_5_moe"),
    "granitemoe": GgufFamily("granitemoe"),
    "gpt-oss": GgufFamily("gpt_oss", period=2, theta=1.5e5),
    "deepseek2": GgufFamily("deepseek_v2", norms_weights=False),
    "glm4moe": GgufFamily("glm4_moe", norms_weights=False),
    "minimax-m2": GgufFamily("minimax_m2"),
    "llama4": GgufFamily("llama4"),
}  # fmt: skip
"""By `general.architecture`. Files of llama with experts are Mixtral's, and those of OLMo 2 with a window OLMo 3's.
DeepSeek 2 whose router has a sigmoid is DeepSeek 3."""

INTERLEAVED = (
    "llama", "mistral", "mixtral", "granite", "granitemoe", "granitemoeshared", "smollm3", "ministral3", "llama4",
)  # fmt: skip
"""Families of whose queries and keys GGUF files hold the two rotary halves of a head interleaved."""


def family_of(architecture: str, fields: Fields, tensors: Collection[str]) -> str:
    """Return mgpu's family of a file. ``fields``: the metadata below the architecture."""
    family = ARCHITECTURES[architecture].family
    if family == "llama" and fields.raw("expert_count"):
        return "mixtral"
    if family == "olmo2" and fields.raw("attention.sliding_window"):
        return "olmo3"
    if family == "granitemoe" and "blk.0.ffn_up_shexp.weight" in tensors:
        return "granitemoeshared"
    if family == "deepseek_v2" and fields.raw("expert_gating_func") == SIGMOID:
        return "deepseek_v3"
    return family
