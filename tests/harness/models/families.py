"""The tiny models of all families, by name (`tiny_configs.tiny_config`), and what differs between families on GPUs."""

from harness.models.tiny_configs import HYBRID_MODELS, WIDE_HYBRIDS
from mgpu.protocol.checkpoint.huggingface.borrowed import BORROWED as BORROWED_TYPES

DENSE = (
    "llama", "llama3-rope", "llama-linear-bias", "llama-longrope", "mistral-window", "mistral3", "ministral",
    "ministral3", "qwen2", "qwen2-yarn", "qwen2.5-vl", "qwen3", "gemma2", "gemma3", "gemma3-vl", "phi3", "phi4-mini",
    "granite", "olmo2", "olmo3", "smollm3", "gemma4", "gemma4-vl",
)  # fmt: skip
EXPERTS = (
    "mixtral", "mixtral-window", "qwen3-moe", "qwen3-moe-plain", "qwen2-moe", "gpt-oss", "granite-moe",
    "granite-moe-shared", "gemma4-moe", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3",
    "mistral4", "glm4-moe", "minimax-m2", "llama4",
)  # fmt: skip
SHARED_CACHES = ("gemma4-small",)
"""Layers read the cache of others, so all must be on one stage."""
HYBRIDS = (*HYBRID_MODELS, *WIDE_HYBRIDS)
BORROWED = tuple(sorted(BORROWED_TYPES.values()))
"""Families that transformers' code runs."""
EVERY = (*DENSE, *EXPERTS, *SHARED_CACHES, *HYBRIDS, *BORROWED)

PLAIN_ATTENTION = ("gemma2", "vaultgemma", "deepseek-v2-lite")
"""Attention runs on plain torch on GPUs, without CUDA graphs: scores are capped, or a part of the latent is no power of
two."""
NOT_CAPTURABLE = ("phimoe", "gpt-oss")
"""The router of transformers' code, and experts in bf16 with biases, make the host wait for the GPU: no CUDA graphs."""
NARROW_STATES = HYBRID_MODELS
"""Heads of linear layers are too narrow for the kernels in two bytes, so these have no CUDA graphs there."""


def has_graphs(family: str, in_two_bytes: bool = False) -> bool:
    """Return True if steps of a family are CUDA graphs on one GPU."""
    is_narrow = family in NARROW_STATES and in_two_bytes
    return not is_narrow and family not in PLAIN_ATTENTION + NOT_CAPTURABLE


def has_experts(family: str) -> bool:
    return family in EXPERTS or "moe" in family or family in ("dots1", "flex_olmo", "mellum", "olmoe", "solar_open")
