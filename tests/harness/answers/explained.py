"""Compare greedy tokens of many rows with a reference in float32; say how far off documented rounding would be.

A token that is not the reference's best one has a margin: how far its logit is below the best, given all tokens before
it. Rounding alone explains margins as large as the errors that it makes. Those errors are measured on the reference
itself, in plain torch: its activations become bfloat16, and those before quantized layers are rounded as documented.
"""

# T tokens of prompt and answer, N tokens of answers, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.models.scheduled_model import Request
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import Row, Stages, make_batch
from mgpu.protocol.checkpoint.read import Checkpoint
from mgpu.protocol.internal.worker_messages import TokenLogprobs
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.layers import linear
from mgpu.worker.quantization.float8_weights import round_dense
from mgpu.worker.quantization.packing import PackedWeight, dequantize

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Margins:
    """How far tokens are below the best of a reference: zero where they are the best."""

    count: int
    different: int
    mean: float
    worst: float

    @staticmethod
    def of(logits_NV: Tensor, ids_N: Tensor) -> "Margins":
        margins_N = logits_NV.amax(1) - logits_NV.gather(1, ids_N[:, None])[:, 0]
        return Margins(len(ids_N), int((margins_N > 0).sum()), float(margins_N.mean()), float(margins_N.max()))


def whole_logprobs(found: Sequence[Sequence[TokenLogprobs]], vocab_size: int) -> Tensor:
    """Return the log-probabilities [N, V] of all tokens, of rows that asked for the whole vocabulary."""
    lines = [each for row in found for each in row]
    whole_NV = torch.full((len(lines), vocab_size), torch.nan)
    for index, each in enumerate(lines):
        whole_NV[index, each.top_ids] = torch.tensor(each.top_logprobs)
    return whole_NV


def logits_after(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    answers: Sequence[list[int]],
    quant: Quant = "none",
    dtype: torch.dtype = torch.float32,
    rounds: Round | None = None,
    rounds_weights: bool = False,
) -> Tensor:
    """Return the logits [N, V] that one worker on the CPU has for each token of the answers, given those before it.

    ``rounds`` is applied to what layers multiply that a quantized model would have quantized. ``rounds_weights``: their
    weights are rounded to float8 as well.
    """
    longest = max(len(request.prompt_ids) + len(ids) for request, ids in zip(requests, answers, strict=True))
    found: list[Tensor] = []

    def work(group: ThreadGroup) -> None:
        layers = [range(checkpoint.facts.num_layers)]
        stages = Stages(checkpoint, group, layers, dtype, num_blocks=-(-longest // 16), block_size=16, quant=quant)
        if rounds is not None:
            _round_inputs(stages, rounds, rounds_weights)
        for request, ids in zip(requests, answers, strict=True):
            row, whole = Row(list(range(stages.num_blocks))), request.prompt_ids + ids[:-1]
            logits_TV = stages.step(make_batch([(row, whole)], stages.block_size, True))
            found.append(logits_TV[len(request.prompt_ids) - 1 :].float())

    with pytest.MonkeyPatch.context() as patch:
        # Own kernels of the CPU round otherwise, and oneDNN's layout is opaque.
        patch.setattr(linear, "held_weight", lambda weight, form, dtype: weight)
        patch.setattr(linear, "pack", lambda weight: weight)
        run_ranks(1, work)
    return torch.cat(found)


def _round_inputs(stages: Stages, rounds: Round, rounds_weights: bool) -> None:
    for _, module in stages.stages[0].named_modules():
        if isinstance(module, (linear.ColumnParallelLinear, linear.RowParallelLinear)):
            for name in ("_multiply", "_multiply_packed"):
                setattr(module, name, partial(_rounded, getattr(module, name), rounds, rounds_weights))


def _rounded(
    multiply: Callable[..., Tensor],
    rounds: Round,
    rounds_weights: bool,
    x_TI: Tensor,
    weight: Tensor | PackedWeight,
    bias_O: Tensor | None,
) -> Tensor:
    x_TI = rounds(x_TI).to(x_TI.dtype)
    if not rounds_weights:
        return multiply(x_TI, weight, bias_O)
    dense_OI = weight if isinstance(weight, Tensor) else dequantize(weight, torch.float32)
    return F.linear(x_TI, round_dense(dense_OI).to(x_TI.dtype), bias_O)
