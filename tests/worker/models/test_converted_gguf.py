"""GGUF files of newer architectures give the logits of the models that they were converted from, packed or not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from harness.models.converted_gguf import CONVERTED, convert
from harness.models.odd_gguf import FILES, rounded
from harness.models.odd_models import IDS, logits_of
from harness.models.stored_models import widened
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import Stages, logits_in_chunks
from mgpu.orchestrator.placement.split.sizes import rank_weight_bytes
from mgpu.protocol.checkpoint.gguf.families import ARCHITECTURES
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.model.placement import PlacementPlan, Stage

PACKED = (
    "qwen3next", "qwen35", "qwen35moe", "deepseek2, V2", "deepseek2, V2-Lite", "mistral4", "gemma4, experts",
    "gemma4, small", "glm4moe", "minimax-m2", "llama4",
)  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_is_computed_as_by_transformers(tmp_path: Path, name: str) -> None:
    model, parts = convert(CONVERTED[name])
    right = logits_of(model)
    (tmp_path / "m.gguf").write_bytes(parts.data())
    checkpoint = read_checkpoint(tmp_path / "m.gguf")
    for ranks in (1, 2):
        logits = logits_in_chunks(checkpoint, IDS, [7, 1, 12], ranks)
        torch.testing.assert_close(logits, right, atol=2e-4, rtol=0)
    assert right.std() > 0.05, "the model tells nothing apart"


def test_every_architecture_is_converted() -> None:
    assert set(ARCHITECTURES) == {case.architecture for case in (*CONVERTED.values(), *FILES.values())}


def mixed(name: str) -> Kind:
    """Return the type of a matrix: converters store those that matter most with more bits."""
    return Kind.Q8_0 if any(part in name for part in ("attn_v.", "attn_gate", "attn_kv_a", "ssm_out")) else Kind.Q4_1


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_file_gives_the_logits_of_its_numbers(tmp_path: Path, name: str) -> None:
    case = CONVERTED[name]
    wide = dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size"), 64)
    _, parts = convert(replace(case, fields=case.fields | wide | {"v_head_dim": 16}))
    found = []
    for kind, each in zip(("packed", "plain"), rounded(parts, mixed), strict=True):
        (tmp_path / f"{kind}.gguf").write_bytes(each.data())
        found.append(read_checkpoint(tmp_path / f"{kind}.gguf"))
    packed, plain = found
    held = packed.facts.formats[0].formats_of("qkv")
    assert len(held) > 1, "the matrices that attention multiplies its input by have several types"
    assert all(form.source.startswith("GGUF ") for form in held)
    expected = logits_in_chunks(plain, IDS, [len(IDS)])
    torch.testing.assert_close(logits_in_chunks(widened(packed), IDS, [len(IDS)], 2), expected, atol=2e-4, rtol=0)
    for ranks in (1, 2):
        place = PlacementPlan((Stage(0, packed.facts.num_layers, tuple(range(ranks))),))
        held = run_ranks(ranks, lambda group: stages_of(packed, group).stages[0].weight_bytes())
        counted = [rank_weight_bytes(packed.facts, place, place.place_of(rank), 4) for rank in range(ranks)]
        assert held == counted
        torch.testing.assert_close(logits_in_chunks(packed, IDS, [19, 1], ranks), expected, atol=2e-4, rtol=0)


def stages_of(checkpoint: Checkpoint, group: ThreadGroup) -> Stages:
    return Stages(checkpoint, group, [range(checkpoint.facts.num_layers)])
