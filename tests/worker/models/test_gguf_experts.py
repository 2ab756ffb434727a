"""Experts of GGUF files are held as they are stored; numbers of them that cannot be are refused."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from harness.models.model_files import u32
from harness.models.odd_gguf import converted
from harness.models.odd_models import IDS, make_model
from harness.models.stored_models import GGUF_EXPERTS, widened, write_gguf_experts
from harness.ranks.rank_threads import run_ranks
from harness.ranks.stage_driver import Stages, logits_in_chunks
from mgpu.orchestrator.placement.split.sizes import rank_weight_bytes
from mgpu.protocol.checkpoint.read import CheckpointError, read_checkpoint
from mgpu.protocol.model.placement import PlacementPlan, Stage


@pytest.mark.parametrize("family", GGUF_EXPERTS)
def test_experts_are_held_as_they_are_stored_and_widen_to_their_numbers(tmp_path: Path, family: str) -> None:
    model, kind = write_gguf_experts(tmp_path, family), GGUF_EXPERTS[family][1]
    held = model.packed.facts.formats[0]
    assert {held.qkv.source, held.gate_up.source, held.down.source} == {f"GGUF {kind.name}"}
    expected = logits_in_chunks(model.plain, IDS, [len(IDS)])
    found = logits_in_chunks(widened(model.packed), IDS, [len(IDS)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_planner_counts_the_bytes_of_packed_experts(tmp_path: Path) -> None:
    packed = write_gguf_experts(tmp_path, "qwen3-moe").packed
    plan = PlacementPlan((Stage(0, 3, (0, 1)),))
    held = run_ranks(2, lambda group: Stages(packed, group, [range(3)]).stages[0].weight_bytes())
    assert held == [rank_weight_bytes(packed.facts, plan, plan.place_of(rank), 4) for rank in range(2)]


def test_experts_of_which_each_has_tensors_of_its_own_are_read_like_stacks(tmp_path: Path) -> None:
    parts = converted(make_model("mixtral"), "llama", Kind.F32)
    (tmp_path / "stacked.gguf").write_bytes(parts.data())
    for name, (shape, kind, data) in list(parts.tensors.items()):
        if "_exps." in name:
            size = len(data) // shape[0]
            del parts.tensors[name]
            for expert in range(shape[0]):
                alone = name.replace("_exps.", f".{expert}.")
                parts.tensors[alone] = shape[1:], kind, data[expert * size : (expert + 1) * size]
    (tmp_path / "apart.gguf").write_bytes(parts.data())
    stacked, apart = (
        logits_in_chunks(read_checkpoint(tmp_path / f"{name}.gguf"), IDS, [len(IDS)]) for name in ("stacked", "apart")
    )
    assert torch.equal(stacked, apart)


@pytest.mark.parametrize(("key", "value", "said"), [
    ("expert_used_count", 7, "is 7, more than the 6 experts"),
    ("expert_count", 5, "ffn_gate_exps.weight' has shape [6, 30, 64], the configuration asks for [5, 30, 64]"),
    ("expert_feed_forward_length", 31, "has shape [6, 30, 64], the configuration asks for [6, 31, 64]"),
    ("expert_gating_func", 2, "is 2, which is not supported"),
    ("expert_used_count", 0, "is 0, outside [1,"),
])  # fmt: skip
def test_numbers_of_experts_that_cannot_be_are_refused(tmp_path: Path, key: str, value: int, said: str) -> None:
    parts = converted(make_model("qwen3-moe"), "qwen3moe", Kind.F32)
    parts.metadata[f"qwen3moe.{key}"] = u32(value)
    (tmp_path / "m.gguf").write_bytes(parts.data())
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "m.gguf")
    assert said in str(caught.value)
    assert "m.gguf" in str(caught.value)
