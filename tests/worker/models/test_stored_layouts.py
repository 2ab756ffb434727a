"""Small models in every stored format give the logits and tokens of their numbers, on 1, 2 and 4 ranks and stages."""

from pathlib import Path

import pytest
import torch

from harness.answers.greedy_runner import alone
from harness.models.stored_models import IDS, STORED
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.worker.layers.experts import sparse_mlp
from mgpu.worker.models.build import build_stage

DENSE: list[tuple[int, int, ExpertSplit]] = [(1, 1, "tensor"), (2, 1, "tensor"), (1, 2, "tensor"), (4, 1, "tensor")]
EXPERTS: list[tuple[int, int, ExpertSplit]] = [*DENSE, (4, 1, "parallel"), (2, 2, "parallel")]
"""Ranks of a stage, stages, and how ranks share experts."""


@pytest.mark.parametrize("name", STORED)
def test_logits_and_tokens_are_those_of_the_same_numbers_on_every_layout(tmp_path: Path, name: str) -> None:
    model = STORED[name](tmp_path)
    expected = logits_in_chunks(model.plain, IDS, [len(IDS)])
    for size, stages, split in EXPERTS if "experts" in name else DENSE:
        chunks = [len(IDS) - 2, 1, 1] if size == stages == 1 else [len(IDS)]
        logits = logits_in_chunks(model.packed, IDS, chunks, size, stages, expert_split=split)
        torch.testing.assert_close(logits, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)
        assert logits.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize(("name", "has_kernels"), [("gptq experts", True), ("gptq-order experts", False)])
def test_experts_that_only_plain_torch_computes_keep_steps_from_being_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, has_kernels: bool
) -> None:
    monkeypatch.setattr(sparse_mlp, "uses_kernels", lambda device: True)
    checkpoint = STORED[name](tmp_path).packed
    place, links = alone()
    stage = build_stage(checkpoint.facts, place, range(2), links.group, torch.float32, torch.device("cpu"))
    stage.assume_kernels()
    assert stage.has_kernels == has_kernels
