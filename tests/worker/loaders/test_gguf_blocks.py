"""Blocks of every type of GGUF stay packed, and stand for the numbers that the gguf package reads from them."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from harness.models.demo_model import demo_model
from harness.models.odd_gguf import Kind, converted
from harness.models.odd_models import IDS, make_model
from harness.ranks.rank_threads import run_ranks
from harness.ranks.stage_driver import Stages, logits_in_chunks
from mgpu.orchestrator.placement.split.sizes import layers_bytes, rank_weight_bytes
from mgpu.protocol.checkpoint.files.tensors import BLOCKS, TensorEntry
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS, packed_entry
from mgpu.protocol.checkpoint.read import CheckpointError, read_checkpoint
from mgpu.protocol.model.placement import PlacementPlan, Stage
from mgpu.worker.loaders.packed import Piece, read_packed
from mgpu.worker.quantization.packing import PackedWeight, dequantize

OUTPUTS, INPUTS = 6, 768
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (),
}  # fmt: skip
"""Where a block of each type has its float16 numbers."""


def random_blocks(kind: str) -> np.ndarray:
    """Return rows of random bytes, whose floats are small."""
    rng = np.random.default_rng(0)
    elements, size = BLOCKS[kind]
    raw = rng.integers(0, 256, (OUTPUTS, INPUTS // elements, size), dtype=np.uint8)
    for place in HALVES[kind]:
        numbers = rng.standard_normal((*raw.shape[:2], 1)) * 0.01
        raw[:, :, place : place + 2] = numbers.astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        raw[:, :, 0] = rng.integers(100, 140, raw.shape[:2])
    return raw.reshape(OUTPUTS, -1)


def read(kind: str, raw: np.ndarray, rows: range = range(OUTPUTS), columns: range = range(INPUTS)) -> PackedWeight:
    entry = packed_entry(TensorEntry("blk.0.ffn_up.weight", kind, (OUTPUTS, INPUTS), "m.gguf", 0, raw.nbytes))
    assert entry.packed is not None
    data = torch.from_numpy(raw)

    def block(part: TensorEntry, rows: range, columns: range) -> Tensor:
        return data[rows.start : rows.stop, columns.start : columns.stop]

    return read_packed([Piece(entry.packed, rows, columns)], block)


@pytest.mark.parametrize("kind", GGUF_FORMATS)
def test_blocks_stand_for_the_numbers_of_the_file_and_take_its_bytes(kind: str) -> None:
    raw = random_blocks(kind)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, Kind[kind]))
    weight = read(kind, raw)
    assert torch.equal(dequantize(weight, torch.float32), expected)
    assert torch.equal(dequantize(read(kind, raw, range(1, 4), range(256, 768)), torch.float32), expected[1:4, 256:])
    assert weight.nbytes == GGUF_FORMATS[kind].matrix_bytes(OUTPUTS, INPUTS, 4) <= 1.04 * raw.nbytes


@pytest.mark.parametrize("kind", [kind for kind in GGUF_FORMATS if HALVES[kind]])
def test_scales_that_are_no_numbers_are_refused_with_the_tensor(kind: str) -> None:
    for place in HALVES[kind]:
        raw = random_blocks(kind)
        raw[2, place : place + 2] = np.array([np.nan], np.float16).view(np.uint8)
        with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight.*m.gguf.*NaN"):
            read(kind, raw)


def mixed_file(folder: Path) -> Path:
    """Write a model whose matrices have several types, as Q4_K_M has."""
    model = make_model("llama")
    parts = {kind: converted(model, "llama", Kind[kind]) for kind in ("Q8_0", "Q4_1", "Q5_0")}
    chosen = parts["Q8_0"]
    for name in chosen.tensors:
        if "attn_v" in name or "ffn_down" in name:
            chosen.tensors[name] = parts["Q5_0"].tensors[name]
        elif "ffn_gate" in name or "attn_q" in name:
            chosen.tensors[name] = parts["Q4_1"].tensors[name]
    path = folder / "m.gguf"
    path.write_bytes(chosen.data())
    return path


def test_a_mix_of_types_stays_packed_on_every_layout(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(mixed_file(tmp_path))
    facts = checkpoint.facts
    assert [form.name for form in facts.formats[0].qkv_parts] == ["GGUF Q4_1", "GGUF Q8_0", "GGUF Q5_0"]
    assert [form.name for form in facts.formats[0].gate_up_parts] == ["GGUF Q4_1", "GGUF Q8_0"]
    widened = replace(checkpoint, facts=replace(facts, formats=()))
    expected = logits_in_chunks(widened, IDS, [7, 1, 12])
    for layout in ((1, 1), (2, 1), (4, 1), (1, 2)):
        logits = logits_in_chunks(checkpoint, IDS, [7, 1, 12], *layout)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    plan = PlacementPlan((Stage(0, facts.num_layers, (0,)),))
    [held] = run_ranks(1, lambda group: Stages(checkpoint, group, [range(facts.num_layers)]).stages[0].weight_bytes())
    assert held == rank_weight_bytes(facts, plan, plan.place_of(0), 4)
    assert held < 0.6 * rank_weight_bytes(widened.facts, plan, plan.place_of(0), 4)


def test_a_real_file_stays_packed_and_gives_the_golden_tokens() -> None:
    golden = json.loads((Path(__file__).parents[2] / "golden" / "smollm2-135m-instruct.json").read_text())
    case = golden["prompts"][1]
    ids, expected = case["prompt_ids"] + case["output_ids"], case["output_ids"]
    checkpoint = read_checkpoint(demo_model())
    logits = logits_in_chunks(checkpoint, ids, [len(ids)])
    assert logits[len(case["prompt_ids"]) - 1 : -1].argmax(-1).tolist() == expected
    stored = sum(entry.nbytes for entry in checkpoint.tensors.values() if "layers" in entry.name)
    assert layers_bytes(checkpoint.facts, range(checkpoint.facts.num_layers), 1, 2, "none") < 1.02 * stored
