"""CUDA graphs choose the tokens that the same steps choose without them."""

from collections.abc import Callable

import pytest
import torch

from harness.models.tiny_models import TinyModel
from harness.ranks.step_plans import BLOCK, BLOCKS_OF_ROW, ROWS, make_plans
from mgpu.protocol.checkpoint.read import read_checkpoint
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


def make_runner(model: TinyModel, dtype: torch.dtype = torch.float32) -> ModelRunner:
    checkpoint = read_checkpoint(model.folder)
    facts, device, place = checkpoint.facts, torch.device("cuda:0"), RankPlace(0, 0, 0, 1, 0)
    links = Links(MeasurableGroup(SingleRank()))
    stage = build_stage(facts, place, range(facts.num_layers), links.group, dtype, device, folder=str(model.folder))
    load_weights(stage, checkpoint, lambda count: None)
    blocks = ROWS * BLOCKS_OF_ROW
    cache = KvCache.of_layers(facts, stage.layer_range, place.part, (blocks, BLOCK, ROWS), (dtype, dtype), device)
    for layer in cache.layers:
        layer.k_NBJK.fill_(torch.nan)
        layer.v_NBJK.fill_(torch.nan)
        if layer.states is not None:
            layer.states.state_NHKV.fill_(torch.nan)
            layer.states.tail_NWC.fill_(torch.nan)
    rows = RowTable(ROWS, BLOCKS_OF_ROW * BLOCK - 1, BLOCK, blocks, device)
    return ModelRunner(stage, cache, rows, links, facts, place, 1)


EXPERTS = ["mixtral-window", "qwen3-moe", "qwen2-moe", "granite-moe-shared"]
LINEAR = ["qwen3.5", "qwen3-next"]
BORROWED = ["arcee", "cohere2"]
"""Families that transformers' code runs."""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((each, torch.float32) for each in ("llama", "qwen3", "gemma3", *EXPERTS, *LINEAR, *BORROWED)),
        ("qwen3-moe", torch.bfloat16),
    ],
    ids=str,
)
def test_graphs_choose_the_same_tokens(tiny_model: Callable[[str], TinyModel], family: str, dtype: torch.dtype) -> None:
    with_graphs, without = (make_runner(tiny_model(family), dtype) for _ in range(2))
    assert with_graphs._graphs is not None
    with_graphs._graphs.prepare()
    without._graphs = None
    for plan in make_plans():
        chosen, expected = with_graphs.run(plan), without.run(plan)
        assert (chosen is None) == (expected is None), plan
        if chosen is not None and expected is not None:
            assert chosen.ids_S.tolist() == expected.ids_S.tolist(), plan
            assert (chosen.logprobs is None) == (expected.logprobs is None)
