"""A random model that needs no transformers and divides into quantization groups."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import expected_tensors


def write_random_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a llama of random weights whose slices are whole int4 groups for 1, 2 and 4 ranks; return its folder."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256, "vocab_size": 100,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(read_config_facts(folder))
    save_file(
        {name: torch.randn(shape, generator=generator).mul_(0.1) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    return folder
