"""Let a rank's `ModelRunner` go on greedily with one prompt in three rows, each computed in another way.

Row 0 computes its prompt in two pieces and decodes alone at first; row 1 begins beside it; row 2 is alone and asks for
the log-probabilities of the whole vocabulary. Where steps are CUDA graphs, rows 0 and 1 get the tokens that the graphs
choose, and row 2 those that the sampler chooses from the graphs' logits.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.read import Checkpoint
from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.models.build import build_stage, load_weights
from mgpu.worker.ranks.collectives import MeasurableGroup, SingleRank
from mgpu.worker.ranks.links import Links
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable
from mgpu.worker.steps.model_runner import ModelRunner

ROWS, BLOCK, BLOCKS_OF_ROW = 3, 16, 3
MOST_TOKENS = BLOCKS_OF_ROW * BLOCK - 1
"""Of prompt and answer."""


@dataclass(frozen=True)
class Rows:
    """What the three rows got."""

    token_ids: list[list[int]]
    logprobs_NV: Tensor
    """Of the last row, float32, one line for each token."""
    has_graphs: bool


def alone() -> tuple[RankPlace, Links]:
    """Return the place and the links of a rank that has the whole model."""
    return RankPlace(0, 0, 0, 1, 0), Links(MeasurableGroup(SingleRank()))


@torch.inference_mode()
def make_runner(
    checkpoint: Checkpoint,
    place: RankPlace,
    layers: range,
    num_stages: int,
    links: Links,
    dtype: torch.dtype,
    device: torch.device,
    split: ExpertSplit = "tensor",
) -> ModelRunner:
    """Load one rank's layers, on a cache in which everything that was not written is NaN."""
    facts = checkpoint.facts
    ends = place.stage_index == 0, place.stage_index == num_stages - 1
    stage = build_stage(
        facts, place, layers, links.group, dtype, device, expert_split=split, folder=checkpoint.source.path, ends=ends
    )
    load_weights(stage, checkpoint, lambda count: None)
    stage.max_positions = MOST_TOKENS + 1
    blocks = ROWS * BLOCKS_OF_ROW
    cache = KvCache.of_layers(facts, layers, place.part, (blocks, BLOCK, ROWS), (dtype, dtype), device)
    for layer in cache.layers:
        layer.k_NBJK.fill_(torch.nan)
        layer.v_NBJK.fill_(torch.nan)
        if layer.states is not None:
            layer.states.state_NHKV.fill_(torch.nan)
            layer.states.tail_NWC.fill_(torch.nan)
    rows = RowTable(ROWS, MOST_TOKENS, BLOCK, blocks, device)
    runner = ModelRunner(stage, cache, rows, links, facts, place, num_stages)
    if runner._graphs is not None and facts.borrowed is not None:
        _try_graphs(runner)
    return runner


def _try_graphs(runner: ModelRunner) -> None:
    """Do without graphs if code of another library cannot be captured, as a worker finds out when it warms up."""
    from mgpu.worker.steps.graph_pool import NotCapturable

    assert runner._graphs is not None
    try:
        runner._graphs._prompts.prepare((64, 8, False))
    except NotCapturable:
        runner._graphs = None


def run_greedily(
    runner: ModelRunner, prompt_ids: list[int], count: int, vocab_size: int, apart: int = 1
) -> Rows | None:
    """Compute ``count`` tokens in each row. Return None on a stage that chooses none.

    ``apart`` is the number of stages: a row's steps are so far apart.
    """
    found: list[list[int]] = [[] for _ in range(ROWS)]
    logprobs = []
    for index, (new_row, table) in enumerate(_steps(len(prompt_ids), count)):
        new = [] if new_row is None else [_new_row(new_row, prompt_ids, count, vocab_size)]
        plan = StepPlan(7, index * apart, [], new, [], [], *([*column] for column in zip(*table, strict=True)))
        sampled = runner.run(plan)
        if sampled is None:
            continue
        rows = [row for row, _, _, samples in table if samples]
        for row, token_id in zip(rows, sampled.ids_S.tolist(), strict=True):
            found[row].append(token_id)
        for each in sampled.logprob_list() or []:
            if each is not None:
                line = torch.full((vocab_size,), torch.nan)
                line[each.top_ids] = torch.tensor(each.top_logprobs)
                logprobs.append(line)
    return Rows(found, torch.stack(logprobs), runner._graphs is not None) if logprobs else None


def _new_row(row: int, prompt_ids: list[int], count: int, vocab_size: int) -> NewRow:
    length = len(prompt_ids)
    blocks = [row + ROWS * index for index in range(-(-(length + count) // BLOCK))]
    sampling = RowSampling(num_logprobs=vocab_size) if row == ROWS - 1 else RowSampling()
    return NewRow(row, array("i", prompt_ids).tobytes(), length, blocks, sampling)


def _steps(length: int, count: int) -> Iterator[tuple[int | None, list[tuple[int, int, int, int]]]]:
    """Yield the row that begins with each step, and the lines of its plan: row, start, count, samples."""
    cut = length * 3 // 8
    yield 0, [(0, 0, cut, 0)]
    yield None, [(0, cut, length - cut, 1)]
    yield 1, [(0, length, 1, 1), (1, 0, length, 1)]
    for start in range(length, length + count - 2):
        yield None, [(0, start + 1, 1, 1), (1, start, 1, 1)]
    yield None, [(1, length + count - 2, 1, 1)]
    yield 2, [(2, 0, length, 1)]
    for start in range(length, length + count - 1):
        yield None, [(2, start, 1, 1)]
