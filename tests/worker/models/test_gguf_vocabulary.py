"""Embedding and head of a GGUF file stay packed: the same logits, and little more memory than the file has."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.broken.models import HIDDEN
from harness.models.stored_models import GGUF_ROWS, IDS, KINDS, read_gguf, widened
from harness.ranks.rank_threads import run_ranks
from harness.ranks.stage_driver import Stages, logits_in_chunks
from mgpu.orchestrator.placement.split.sizes import rank_weight_bytes
from mgpu.protocol.model.placement import PlacementPlan, Stage
from mgpu.protocol.model.weight_format import DENSE


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_logits_of_a_tied_head_are_those_of_a_widened_one(tmp_path: Path, kind: str) -> None:
    checkpoint = read_gguf(tmp_path, kind, tied=True)
    facts = checkpoint.facts
    assert facts.embedding_format.source == facts.head_format.source == f"GGUF {kind}"
    expected = logits_in_chunks(widened(checkpoint), IDS, [len(IDS)])
    for size in (1, 2, 4):
        logits = logits_in_chunks(checkpoint, IDS, [6, 1, 1, 2], size)
        torch.testing.assert_close(logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_holds_at_most_a_tenth_more_than_its_share_of_the_file(tmp_path: Path, kind: str) -> None:
    """In float16, in which no CPU arranges words anew: what a GPU holds."""
    checkpoint = read_gguf(tmp_path, kind)
    size = 2
    plan = PlacementPlan((Stage(0, 1, tuple(range(size))),))
    held = run_ranks(size, lambda group: Stages(checkpoint, group, [range(1)], torch.float16).stages[0].weight_bytes())
    stored = sum(entry.nbytes for entry in checkpoint.tensors.values())
    assert max(held) <= 1.10 * stored / size
    assert held == [rank_weight_bytes(checkpoint.facts, plan, plan.place_of(rank), 2) for rank in range(size)]


def test_stages_of_a_tied_model_hold_the_rows_packed_each(tmp_path: Path) -> None:
    checkpoint = read_gguf(tmp_path, "Q4_K", tied=True)
    [stages] = run_ranks(1, lambda group: Stages(checkpoint, group, [range(1), range(1, 1)]).stages)
    first, last = stages
    assert first.embedding.packed is not None
    assert last.head.packed is not None
    assert first.embedding.packed.nbytes == last.head.packed.nbytes < GGUF_ROWS * HIDDEN
    anew, dense = (
        logits_in_chunks(replace(checkpoint, facts=facts), IDS, [10], quant="8")
        for facts in (checkpoint.facts, replace(checkpoint.facts, embedding_format=DENSE, head_format=DENSE))
    )
    assert torch.equal(anew, dense), "--quant holds both dense"
