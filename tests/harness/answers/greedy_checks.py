"""Compare what rows got (`greedy_runner`) with a reference in float32."""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.answers.greedy_runner import Rows
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import Checkpoint


@dataclass(frozen=True)
class Reference:
    """A prompt, its greedy answer, and the logits after each token of the prompt's last and of the answer."""

    prompt_ids: list[int]
    output_ids: list[int]
    logits_NV: Tensor


def on_the_cpu(checkpoint: Checkpoint, prompt_ids: list[int], count: int) -> Reference:
    """Return what one worker on the CPU computes in float32."""
    ids = list(prompt_ids)
    logits: list[Tensor] = []
    for _ in range(count):
        logits.append(logits_in_chunks(checkpoint, ids, [len(ids)])[-1])
        ids.append(int(logits[-1].argmax()))
    return Reference(prompt_ids, ids[len(prompt_ids) :], torch.stack(logits))


def assert_equal(rows: Rows, reference: Reference) -> None:
    """Every row has the reference's tokens, and the log-probabilities are those of its logits to 1e-4 of their size."""
    assert rows.token_ids == [reference.output_ids] * len(rows.token_ids)
    bound = 2e-4 * max(1.0, float(reference.logits_NV.abs().max()))  # of a logit, and of the sum over all of them
    torch.testing.assert_close(rows.logprobs_NV, reference.logits_NV.log_softmax(-1), atol=bound, rtol=0)


def assert_near(rows: Rows, checkpoint: Checkpoint, prompt_ids: list[int], share: float) -> None:
    """Log-probabilities differ by less than ``share`` of how far logits spread, and tokens are so near to the best.

    What rows chose may differ from what float32 chooses, so the reference goes on with what they chose.
    """
    expected = [_logits_of(checkpoint, prompt_ids, ids) for ids in rows.token_ids]
    bound = share * float(expected[-1].std())
    assert (rows.logprobs_NV - expected[-1].log_softmax(-1)).abs().mean() < bound
    for ids, logits_NV in zip(rows.token_ids, expected, strict=True):
        assert (logits_NV.amax(1) - logits_NV.gather(1, torch.tensor(ids)[:, None])[:, 0]).mean() < bound
    ids_N1 = torch.tensor(rows.token_ids[-1])[:, None]
    assert (rows.logprobs_NV.gather(1, ids_N1) == rows.logprobs_NV.amax(1, keepdim=True)).all()


def _logits_of(checkpoint: Checkpoint, prompt_ids: list[int], ids: list[int]) -> Tensor:
    whole = prompt_ids + ids[:-1]
    return logits_in_chunks(checkpoint, whole, [len(whole)])[len(prompt_ids) - 1 :]
