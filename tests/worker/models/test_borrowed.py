"""Families that run through transformers' own code equal transformers, on every layout."""

from collections.abc import Callable

import pytest
import torch

from harness.stage_driver import logits_in_chunks
from harness.tiny_models import TinyModel
from mgpu.protocol.checkpoint.borrowed import BORROWED, UNSPLIT
from mgpu.protocol.checkpoint.read import CheckpointError, read_checkpoint

MakeModel = Callable[[str], TinyModel]
FAMILIES = sorted(BORROWED.values())
LAYOUTS = [(family, 1, 1) for family in ("cohere", "stablelm", "starcoder2")]
LAYOUTS += [(family, 1 if family in UNSPLIT else 2, 2) for family in FAMILIES]
LAYOUTS += [(family, 4, 1) for family in ("cohere2", "glm4", "phi")]


@pytest.mark.parametrize(("family", "tp_size", "stages"), LAYOUTS)
def test_a_borrowed_family_equals_transformers(tiny_model: MakeModel, family: str, tp_size: int, stages: int) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    chunks = [9, len(model.prompt_ids) - 9] + [1] * len(model.output_ids)
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, chunks, tp_size, stages)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)
    assert logits[len(model.prompt_ids) - 1 : -1].argmax(-1).tolist() == model.output_ids


@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3"])
def test_transformers_code_runs_own_families_too(tiny_model: MakeModel, family: str) -> None:
    name = "mistral-window" if family == "mistral" else family
    model = tiny_model(name)
    ids = model.prompt_ids + model.output_ids
    checkpoint = read_checkpoint(model.folder, code="transformers")
    assert checkpoint.facts.borrowed is not None
    logits = logits_in_chunks(checkpoint, ids, [9, len(ids) - 9], 2, 2)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)


def test_attention_that_transformers_cannot_split_is_refused(tiny_model: MakeModel) -> None:
    checkpoint = read_checkpoint(tiny_model("stablelm").folder)
    with pytest.raises(CheckpointError, match="no plan to split the attention of stablelm over 2 ranks"):
        logits_in_chunks(checkpoint, [3], [1], tp_size=2)
