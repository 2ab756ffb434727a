"""Experts of GGUF files stay packed, and give the logits of the same numbers in F32, on every layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from harness.model_files import f32, string, u32
from harness.odd_gguf import converted, rounded
from harness.odd_models import IDS, make_model
from harness.rank_threads import run_ranks
from harness.stage_driver import Stages, logits_in_chunks
from mgpu.orchestrator.placement.split.sizes import rank_weight_bytes
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, read_checkpoint
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.placement import PlacementPlan, Stage
from mgpu.protocol.model.quantization import group_problems

LAYOUTS: list[tuple[int, int, ExpertSplit]] = [
    (1, 1, "tensor"), (1, 3, "tensor"), (2, 1, "tensor"), (2, 1, "parallel"), (4, 1, "parallel"),
]  # fmt: skip
"""Ranks of a stage, stages, and how ranks share experts."""
SIZES = {"head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}


def write(folder: Path, family: str, architecture: str, kind: Kind) -> tuple[Checkpoint, Checkpoint]:
    """Write a file twice: with its matrices packed, and with the same numbers in F32."""
    parts = converted(make_model(family, **SIZES, mlp_only_layers=[]), architecture, Kind.F32)
    if family == "gpt-oss":
        parts.set(scaling_type=string("yarn"), factor=f32(4.0), original=u32(64))
    found = []
    for name, each in zip(("packed", "plain"), rounded(parts, kind), strict=True):
        (folder / f"{name}.gguf").write_bytes(each.data())
        found.append(read_checkpoint(folder / f"{name}.gguf"))
    return found[0], found[1]


@pytest.mark.parametrize(("family", "architecture", "kind"), [
    ("mixtral", "llama", Kind.Q4_1), ("qwen2-moe", "qwen2moe", Kind.Q8_0), ("qwen3-moe", "qwen3moe", Kind.Q4_0),
    ("granite-moe-shared", "granitemoe", Kind.Q5_0), ("gpt-oss", "gpt-oss", Kind.MXFP4),
])  # fmt: skip
def test_packed_experts_give_the_logits_of_their_numbers(
    tmp_path: Path, family: str, architecture: str, kind: Kind
) -> None:
    packed, plain = write(tmp_path, family, architecture, kind)
    held = packed.facts.formats[0]
    assert {held.qkv.source, held.gate_up.source, held.down.source} == {f"GGUF {kind.name}"}
    expected = logits_in_chunks(plain, IDS, [len(IDS)])
    widened = replace(packed, facts=replace(packed.facts, formats=()))
    torch.testing.assert_close(logits_in_chunks(widened, IDS, [len(IDS)]), expected, atol=1e-5, rtol=0)
    for size, stages, split in LAYOUTS:
        if group_problems("none", packed.facts, size, split):
            continue
        logits = logits_in_chunks(packed, IDS, [len(IDS) - 2, 1, 1], size, stages, expert_split=split)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert logits.argmax(-1).tolist() == expected.argmax(-1).tolist()


def test_the_planner_counts_the_bytes_of_packed_experts(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, "qwen3-moe", "qwen3moe", Kind.Q4_0)
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
