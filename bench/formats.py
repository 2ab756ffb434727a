"""Formats of quantized checkpoints for models that are a configuration alone, whose weights are random."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mgpu.launch.bench.shapes import Config, write_config
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.weight_format import uniform

QUANTIZED: Mapping[str, Mapping[str, object]] = {
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "FP8-blocks": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
"""What config.json says of them."""
FORMATS = ("", *QUANTIZED, *GGUF_FORMATS)


def facts_in(config: Config, name: str = "") -> ModelFacts:
    """Return the facts of a model with all linear layers in a format; in one of GGUF, the head too."""
    if name in QUANTIZED:
        config = {**config, "quantization_config": QUANTIZED[name]}
    with tempfile.TemporaryDirectory() as folder:
        facts = read_checkpoint(write_config(Path(folder), config), "dummy").facts
    if name not in GGUF_FORMATS:
        return facts
    form = GGUF_FORMATS[name]
    return replace(facts, formats=(uniform(form),) * facts.num_layers, head_format=form)
