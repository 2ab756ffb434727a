"""The perplexity bench scores each token by what came before it, however the logits are cut."""

from pathlib import Path

import pytest
import torch

from bench import perplexity
from harness.models.random_model import write_random_model
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import read_checkpoint

IDS = [5, 90, 17, 3, 44, 61, 8, 29, 70, 11]


@torch.inference_mode()
def test_likelihoods_are_those_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 4)
    checkpoint = read_checkpoint(write_random_model(tmp_path))
    stage = perplexity.load(checkpoint, perplexity.FORMATS["8"])
    scored = perplexity.negative_log_likelihoods(stage, IDS, torch.float32)
    logprobs = logits_in_chunks(checkpoint, IDS, [len(IDS)], quant="8").log_softmax(-1)
    expected = torch.stack([-logprobs[at, IDS[at + 1]] for at in range(len(IDS) - 1)])
    torch.testing.assert_close(scored, expected.double(), atol=1e-5, rtol=0)


def test_windows_begin_with_the_first_ids_and_do_not_overlap(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_random_model(tmp_path))
    result = perplexity.measure(checkpoint, perplexity.cut([1], IDS, 4), "float32")
    assert result["tokens"] == 3 * 3  # three windows of three new tokens, each scored after the first id


def test_rounding_in_another_order_puts_every_input_back() -> None:
    weight_OI = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    for order in (perplexity.shifted, perplexity.shuffled):
        assert torch.equal(perplexity.regrouped(order, lambda each: each)(weight_OI), weight_OI)


def test_a_rounding_replaces_the_weights_of_linear_layers(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_random_model(tmp_path))
    emulated = perplexity.load(checkpoint, perplexity.Format(rounding=perplexity.searched))
    quantized = perplexity.load(checkpoint, perplexity.FORMATS["4"])
    scores = [perplexity.negative_log_likelihoods(stage, IDS, torch.float32) for stage in (emulated, quantized)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-5)
