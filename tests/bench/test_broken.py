"""Broken models of every stored format are refused with file and tensor, or loaded whole: samples of `bench.broken`."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.broken.breakages import Breakage, breakages
from bench.broken.examine import examine
from bench.broken.models import MODELS

SAMPLE = 8
"""Breakages of each model."""
ALWAYS = {
    "W8A8": ("model.layers.0.mlp.down_proj.weight as F8_E5M2", "quantization_config.config_groups.group_0 = {}"),
    "fp8 blocks": ("model.layers.0.mlp.down_proj.weight_scale_inv with 3e38 at 0",),
    "gptq-4 in act-order": ("model.layers.0.mlp.down_proj.g_idx with group -1 at 0",),
    "GGUF Q4_0": ("token_embd.weight called Q8_0", "output_norm.weight called F16", "4096 bytes too many"),
    "GGUF deepseek2": (f"deepseek2.rope.scaling.factor = {1 << 60}", "blk.0.attn_k_b.weight as [2, 128, 64]"),
    "GGUF qwen35": ("qwen35.nextn_predict_layers = 3", "blk.0.ssm_conv1d.weight as [4, 256]"),
    "GGUF gemma4": ("gemma4.attention.shared_kv_layers = 3",),
    "GGUF in two parts": ("split.count = 3", "the last file missing"),
}  # fmt: skip
"""What was once received wrongly, or is the point of a format."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", MODELS)
def test_broken_models_are_refused_by_name_or_loaded_whole(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    everything = list(breakages(model))
    chosen = [each for each in everything if each.name in ALWAYS.get(name, ())]
    assert len(chosen) == len(ALWAYS.get(name, ()))
    whole = examine(model, Breakage("nothing", is_fatal=False), tmp_path)
    assert whole.was_loaded
    assert not whole.refusal + whole.problem
    for each in chosen + random.Random(f"{name} 1").sample(everything, SAMPLE):
        verdict = examine(model, each, tmp_path)
        assert not verdict.problem, f"{name}: {each.name}: {verdict.problem}"
