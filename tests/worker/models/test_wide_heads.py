"""Layers with heads of two kinds: bytes as planned, in every format, and a cache of two shapes."""

from collections.abc import Callable

import pytest
import torch

from harness.rank_threads import ThreadGroup, run_ranks
from harness.stage_driver import Stages, logits_in_chunks
from harness.tiny_models import TinyModel
from mgpu.orchestrator.placement.sizes import kv_token_bytes, rank_weight_bytes
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.placement import PlacementPlan, Stage, TensorPart
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.state.kv_cache import block_bytes

MakeModel = Callable[[str], TinyModel]


@pytest.mark.parametrize("quant", ["none", "8"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_planner_counts_the_bytes_that_a_rank_holds(tiny_model: MakeModel, tp_size: int, quant: Quant) -> None:
    checkpoint = read_checkpoint(tiny_model("gemma4").folder)
    halves, ranks = [range(2), range(2, 4)], tuple(range(tp_size))
    facts, plan = checkpoint.facts, PlacementPlan((Stage(0, 2, ranks), Stage(2, 4, ranks)))

    def work(group: ThreadGroup) -> tuple[list[int], int]:
        stages = Stages(checkpoint, group, halves, quant=quant)
        layers = [layer for cache in stages.caches for layer in cache.layers]
        held = sum(layer.k_NBJK[0].nbytes + layer.v_NBJK[0].nbytes for layer in layers)
        return [stage.weight_bytes() for stage in stages.stages], held

    held = run_ranks(tp_size, work)
    weights, block = [max(sizes) for sizes in zip(*(each[0] for each in held), strict=True)], held[0][1]
    places = plan.place_of(0), plan.place_of(tp_size)
    assert weights == [rank_weight_bytes(facts, plan, place, 4, quant) for place in places]
    assert block == 4 * kv_token_bytes(facts, range(4), tp_size, 4)
    assert block == block_bytes(facts, range(4), TensorPart(0, tp_size), 4, torch.float32)


def test_quantized_weights_stay_near_dense_ones(tiny_model: MakeModel) -> None:
    model = tiny_model("gemma4")
    logits = logits_in_chunks(read_checkpoint(model.folder), model.prompt_ids, [20, 1, 3], quant="8")
    assert (logits - model.logits[:24]).abs().mean() < 0.05 * model.logits.std()


def test_bfloat16_stays_near_float32(tiny_model: MakeModel) -> None:
    model = tiny_model("gemma4")
    logits = logits_in_chunks(read_checkpoint(model.folder), model.prompt_ids, [10, 1, 13], 2, dtype=torch.bfloat16)
    assert (logits - model.logits[:24]).abs().mean() < 0.05 * model.logits.std()
