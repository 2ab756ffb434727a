"""CUDA graphs choose the tokens that the same steps choose without them."""

import random
from collections.abc import Callable

import pytest
import torch

from harness.tiny_models import TinyModel
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.models.build import build_stage, load_weights
from mgpu.worker.ranks.collectives import MeasurableGroup, SingleRank
from mgpu.worker.ranks.links import Links
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable
from mgpu.worker.steps.model_runner import ModelRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCK, BLOCKS_OF_ROW, ROWS = 16, 8, 5
SAMPLINGS = (
    RowSampling(),
    RowSampling(temperature=0.8, seed=11),
    RowSampling(temperature=1.2, top_k=7, seed=1 << 40),
    RowSampling(frequency_penalty=0.5, presence_penalty=0.3),
    RowSampling(temperature=1.0, seed=5, num_logprobs=2),
)


def make_runner(model: TinyModel) -> ModelRunner:
    checkpoint = read_checkpoint(model.folder)
    facts, device, place = checkpoint.facts, torch.device("cuda:0"), RankPlace(0, 0, 0, 1, 0)
    links = Links(MeasurableGroup(SingleRank()))
    stage = build_stage(facts, place, range(facts.num_layers), links.group, torch.float32, device)
    load_weights(stage, checkpoint, lambda count: None)
    blocks = ROWS * BLOCKS_OF_ROW
    cache = KvCache(facts.num_layers, blocks, BLOCK, facts.num_kv_heads, facts.head_dim, torch.float32, device)
    for layer in cache.layers:
        layer.k_NBJK.fill_(torch.nan)
        layer.v_NBJK.fill_(torch.nan)
    rows = RowTable(ROWS, BLOCKS_OF_ROW * BLOCK - 1, BLOCK, blocks, device)
    return ModelRunner(stage, cache, rows, links, facts, place, 1)


def make_plans() -> list[StepPlan]:
    """Yield prompts in chunks, decoding beside them, blocks that arrive when they are needed, and rows that change."""
    draw = random.Random(0)
    plans: list[StepPlan] = []
    done: dict[int, tuple[int, int]] = {}  # row: tokens computed, tokens of the prompt
    for step in range(60):
        plan = StepPlan(0, step, [], [], [], [], [], [], [], [])
        if step % 20 == 15:
            row = draw.choice(sorted(done))
            del done[row]
            plan.free_rows.append(row)
        rows = sorted(done, key=lambda row: done[row][0] < done[row][1])
        waiting = [row for row in range(ROWS) if row not in done and row not in plan.free_rows]
        if waiting and step % 4 == 0:
            row, length = waiting[0], draw.randrange(1, 50)
            ids = torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(step), dtype=torch.int32)
            blocks = [row * BLOCKS_OF_ROW + i for i in range(-(-length // BLOCK))]
            plan.new_rows.append(NewRow(row, ids.numpy().tobytes(), length, blocks, SAMPLINGS[row]))
            done[row] = 0, length
            rows.append(row)
        for row in rows:
            start, length = done[row]
            count = min(20, length - start) if start < length else 1
            if start >= length and start % BLOCK == 0:
                plan.block_rows.append(row)
                plan.block_ids.append(row * BLOCKS_OF_ROW + start // BLOCK)
            plan.rows.append(row)
            plan.starts.append(start)
            plan.counts.append(count)
            plan.samples.append(int(start + count >= length))
            done[row] = start + count, length
        plans.append(plan)
    return plans


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_graphs_choose_the_same_tokens(tiny_model: Callable[[str], TinyModel], family: str) -> None:
    with_graphs, without = make_runner(tiny_model(family)), make_runner(tiny_model(family))
    assert with_graphs._graphs is not None
    with_graphs._graphs.prepare()
    without._graphs = None
    for plan in make_plans():
        chosen, expected = with_graphs.run(plan), without.run(plan)
        assert (chosen is None) == (expected is None), plan
        if chosen is not None and expected is not None:
            assert chosen.ids_S.tolist() == expected.ids_S.tolist(), plan
            assert (chosen.logprobs is None) == (expected.logprobs is None)
