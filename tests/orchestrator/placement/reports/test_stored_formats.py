"""Plans of quantized checkpoints: bits, what is dense, and sizes that cut groups."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from bench.broken.models import HIDDEN, MODELS, VOCAB, write_model
from bench.broken.models import made as made_tensor
from harness.machines import QWEN3_32B, cpus, gpus
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.speed import estimate_speed, speed_lines
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.orchestrator.placement.split.divisibility import compatible_sizes
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.weight_format import DENSE, LayerFormats, WeightFormat, uniform

INT4 = WeightFormat("4", 128, 1, 2, 1, source="GPTQ int4, groups of 128")
EIGHT = WeightFormat("fp8", source="FP8, a scale per output")


def stored(*layers: LayerFormats) -> ModelFacts:
    """Return the facts of Qwen3-32B whose layers take turns with these formats."""
    return replace(QWEN3_32B, formats=tuple(layers[layer % len(layers)] for layer in range(64)))


def test_the_layout_says_formats_bits_and_what_is_dense() -> None:
    made = plan(stored(uniform(INT4), LayerFormats(EIGHT, EIGHT, DENSE, EIGHT)), gpus(80), LayoutOptions())
    text = layout_text(made)
    assert "layers in GPTQ int4, groups of 128; FP8, a scale per output: " in text
    assert "dense: embedding, head, norms, gate and up in 32 of 64 layers. Scales of activations, keys and" in text
    assert layout_json(made)["checkpoint_formats"]["dense"] == ["gate and up in 32 of 64 layers"]
    only = plan(stored(uniform(INT4)), gpus(80), LayoutOptions())
    assert "4.19 bits per weight; dense: embedding, head, norms." in layout_text(only)
    assert only.rows[0].weight_bytes < 0.6 * made.rows[0].weight_bytes


def test_a_size_that_cuts_groups_is_refused_before_anything_starts() -> None:
    whole = replace(INT4, group=1280)
    facts = stored(uniform(INT4), LayerFormats(down=whole))
    assert compatible_sizes(stored(uniform(INT4)), "none") == (1, 2, 4, 8)
    assert compatible_sizes(facts, "none") == (1, 2, 4)
    with pytest.raises(PlacementError, match="MLP width 25600 / 8 ranks = 3200, not a multiple of 1280"):
        plan(facts, gpus(*[80] * 8), LayoutOptions(tp=8))
    assert compatible_sizes(stored(uniform(replace(INT4, is_ordered=True, group=1280))), "none")[-1] == 64


def test_speed_is_not_estimated_and_quant_quantizes_anew() -> None:
    facts = stored(uniform(INT4))
    made = plan(facts, gpus(80), LayoutOptions())
    assert estimate_speed(made) is None
    assert "not been measured" in speed_lines(made, None)[0]
    anew = plan(facts, gpus(80), LayoutOptions(quant="8"))
    assert anew.rows[0].weight_bytes == plan(QWEN3_32B, gpus(80), LayoutOptions(quant="8")).rows[0].weight_bytes
    assert "checkpoint:" not in layout_text(anew)
    assert plan(facts, cpus(1, 64), LayoutOptions()).rows[0].weight_bytes > 0


def test_formats_of_embedding_and_head_of_a_gguf_file_are_said(tmp_path: Path) -> None:
    head = made_tensor(random.Random(0), "Q6_K", VOCAB, HIDDEN)
    embedding = made_tensor(random.Random(0), "F16", VOCAB, HIDDEN)
    model = MODELS["GGUF Q4_K"].with_tensor("output.weight", head).with_tensor("token_embd.weight", embedding)
    facts = read_checkpoint(write_model(model, tmp_path)).facts
    made = plan(facts, gpus(8), LayoutOptions())
    said = "layers in GGUF Q4_K: 4.62 bits per weight; head in GGUF Q6_K; dense: embedding, norms"
    assert said in layout_text(made)
    assert "Scales of activations" not in layout_text(made), "a GGUF file has none"
    assert layout_json(made)["checkpoint_formats"] == {
        "formats": ["GGUF Q4_K"], "bits_per_weight": 4.625, "dense": [], "embedding": "dense", "head": "GGUF Q6_K",
    }  # fmt: skip
    assert "checkpoint:" not in layout_text(plan(facts, cpus(1), LayoutOptions())), "a CPU widens it"
