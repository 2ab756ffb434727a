"""Random models of every family, made and judged by transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.models.tiny_configs import HYBRID_MODELS, MULTIMODAL, TINY, WIDE_HYBRIDS, tiny_config


@dataclass(frozen=True)
class TinyModel:
    """A random model on disk, and what transformers makes of one prompt."""

    folder: Path
    prompt_ids: list[int]
    output_ids: list[int]
    logits: Tensor
    """Of prompt and output, [T, vocabulary], float32."""


@torch.inference_mode()
def make_tiny_model(family: str, folder: Path) -> TinyModel:
    """Save a random model and record what transformers computes with it."""
    import transformers as hf

    hf.set_seed(0)
    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    kind = hf.AutoModelForImageTextToText if family in MULTIMODAL else hf.AutoModelForCausalLM
    make = hf.Mistral4ForCausalLM._from_config if family == "mistral4" else kind.from_config  # no Auto class knows it
    model = make(tiny_config(family), **ways).float().eval()
    corrections = [each for each in model.named_buffers() if each[0].endswith("e_score_correction_bias")]
    for name, parameter in (*model.named_parameters(), *corrections):
        # The defaults, zero biases and unit norms, would hide mistakes; larger weights tell tokens apart.
        is_wide = name.endswith(
            (
                "norm.weight",
                "bias",
                "gate.weight",
                "router.weight",
                "layer.weight",
                "sinks",
                ".scale",
                "per_expert_scale",
            )
        )
        parameter.normal_(0.0, 0.3 if is_wide else 0.1)
        is_zero_centred = (
            family in ("gemma2", "gemma3", "gemma3-vl", *HYBRID_MODELS, *WIDE_HYBRIDS) and "linear_attn" not in name
        )
        if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight")) and not is_zero_centred:
            parameter.add_(1.0)
    for name, number in model.named_buffers():
        if name.endswith("layer_scalar"):
            number.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="100KB")
    prompt_ids = torch.randint(3, TINY["vocab_size"], (24,)).tolist()
    ids = list(prompt_ids)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return TinyModel(folder, prompt_ids, ids[len(prompt_ids) :], model(torch.tensor([ids])).logits[0])
