"""Make a Hugging Face model of a shape in place, with random weights, in the type that mgpu would serve it in."""

import tempfile
from pathlib import Path
from typing import Any

from bench.peers.peer import need
from mgpu.launch.bench.shapes import Config, write_config

try:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging
except ImportError as error:
    raise need("transformers", error) from error


def make_model(shape: str, config_of_shape: Config, device: str) -> tuple[Any, dict[str, object]]:
    """Return the model of a shape's configuration and what is saved beside its numbers."""
    logging.set_verbosity_error()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_config(Path(folder), config_of_shape))
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model, {"model": f"{shape} (random weights)", "dtype": str(dtype).removeprefix("torch."), "device": device}
